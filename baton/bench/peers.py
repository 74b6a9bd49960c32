"""Where the engines that Baton is compared with are: scripts in benchmarks/peers, each run by the Python of its own environment."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.bench.report import TREE
from protocol.errors import ConfigError

PEERS = ("vllm", "transformers", "llamacpp")
OURS = "baton"
SCRIPTS = TREE / "benchmarks" / "peers"
SPOKEN = Path(__file__).with_name("spoken.py")
REMEDY = "docs/benchmarks.md says how to install the peers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One engine that takes part. `workloads` None: in all of them."""

    name: str
    command: tuple[str, ...]
    workloads: frozenset[str] | None = None

    def takes_part_in(self, workload: str) -> bool:
        return self.workloads is None or workload in self.workloads


def our_engine() -> Contender:
    return Contender(name=OURS, command=(sys.executable, "-P", "-m", "baton.bench.subject"))


def find_peers(asked: str, environments: Sequence[str]) -> tuple[Contender, ...]:
    """Those of `asked` ("vllm,llamacpp:one_stream+prefill2k") with the Pythons of `environments` ("vllm=/path/to/python").

    Raises:
        ConfigError: a peer is unknown, has no environment, or its script is not here.
    """
    pythons = dict(parse_environment(environment) for environment in environments)
    found = []
    for part in (part.strip() for part in asked.split(",")):
        name, _, workloads = part.partition(":")
        if not name:
            continue
        if name not in PEERS:
            raise ConfigError(f"peer {name!r} is unknown; choose from {', '.join(PEERS)}")
        if name not in pythons:
            raise ConfigError(f"no environment for {name}; name its Python: --peer-env {name}=/path/to/python ({REMEDY})")
        script = SCRIPTS / f"{name}.py"
        if not script.exists():
            raise ConfigError(f"{script} is not there: peers are measured from a source tree, not from an installed wheel")
        only = frozenset(workloads.split("+")) if workloads else None
        found.append(Contender(name=name, command=(str(pythons[name]), "-P", str(script), str(SPOKEN)), workloads=only))
    return tuple(found)


def parse_environment(text: str, names: Sequence[str] = PEERS) -> tuple[str, Path]:
    """Name and Python of "NAME=PYTHON", a NAME of `names`.

    Raises:
        ConfigError: it is something else, or there is no Python.
    """
    name, separator, path = text.partition("=")
    if not separator or name not in names:
        raise ConfigError(f"--peer-env {text!r} is not NAME=PYTHON with a NAME of {', '.join(names)}")
    python = Path(path).expanduser()
    if (python / "bin" / "python").exists():
        python = python / "bin" / "python"  # an environment's folder does as well
    if not python.is_file() or shutil.which(str(python)) is None:
        raise ConfigError(f"--peer-env {name}: {path} is not a Python; {REMEDY}")
    return name, python.absolute()


def environment_of(contender: Contender) -> Mapping[str, str]:
    """Ours keeps the import path it has; a peer's Python must not see our packages, some of which have names of others."""
    environment = dict(os.environ)
    if contender.name == OURS:
        return environment | {"PYTHONPATH": os.pathsep.join([str(TREE), *filter(None, [environment.get("PYTHONPATH")])])}
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        environment.pop(name, None)
    return environment | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
