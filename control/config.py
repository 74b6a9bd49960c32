"""The one door for files, flags and environment: they come in here and leave as a frozen ClusterConfig (control/sections.py).

strongest   flags                          --port 8001
            a tree given in code           {"http": {"port": 8001}}
            the YAML file                  http: {port: 8001}
            BATON_* variables              BATON_PORT=8001
            variables of other tools       HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT, RAY_ADDRESS
weakest     defaults of the dataclasses
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from control.binding import Given, KeyPath, Settings, bind, flatten, merge
from control.flags import flag_settings, variable_settings
from control.sections import ClusterConfig
from control.yaml_file import read_yaml

FOREIGN_VARIABLES: dict[str, KeyPath] = {
    "HF_ENDPOINT": ("hub", "endpoint"),
    "HF_TOKEN": ("hub", "token"),
    "HF_HUB_OFFLINE": ("hub", "offline"),
    "HF_HUB_CACHE": ("hub", "cache_dir"),
    "RAY_ADDRESS": ("ray", "address"),
}


def load_config(
    tree: Mapping[str, object] | None = None,
    *,
    flags: Mapping[str, object] | None = None,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> ClusterConfig:
    """The configuration of one start; without arguments, the defaults.

    tree: sections as in the YAML file, given in code.
    flags: parameter ("max_model_len") to value as given; None: not given. control/flags.py has the table.
    file: a YAML file; None: the one that BATON_CONFIG names, if any.
    environ: os.environ, for who wants it read.

    Raises:
        ConfigError: an unknown key, a wrong type, a value outside its limits; says where, and what instead.
    """
    environ = environ or {}
    if file is None and environ.get("BATON_CONFIG"):
        file = Path(environ["BATON_CONFIG"])
    return bind(
        ClusterConfig,
        merge(
            flag_settings(flags or {}),
            tree_settings(tree or {}),
            file_settings(file) if file is not None else {},
            variable_settings(environ),
            foreign_settings(environ),
        ),
    )


def file_settings(path: Path) -> Settings:
    """The settings in a YAML file."""
    read = read_yaml(path)
    return flatten(ClusterConfig, _spelled_out(read.tree), read.place)


def tree_settings(tree: Mapping[str, object]) -> Settings:
    return flatten(ClusterConfig, _spelled_out(tree), lambda _: "configuration")


def _spelled_out(tree: Mapping[str, object]) -> Mapping[str, object]:
    """`model: NAME` is short for `model: {path: NAME}`."""
    return {**tree, "model": {"path": tree["model"]}} if isinstance(tree.get("model"), str) else tree


def foreign_settings(environ: Mapping[str, str]) -> Settings:
    """What users have told Hugging Face's and Ray's tools; an empty variable counts as not set."""
    settings = {path: Given(environ[name], name) for name, path in FOREIGN_VARIABLES.items() if environ.get(name)}
    if environ.get("HF_HOME"):
        settings.setdefault(("hub", "cache_dir"), Given(str(Path(environ["HF_HOME"]) / "hub"), "HF_HOME"))
    return settings


__all__ = ["ClusterConfig", "load_config"]
