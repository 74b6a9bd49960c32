"""Placement policies: one file and one dictionary entry each; a user's own is `module:Class`.

    round_robin                     prefix_cost:beta=2          my_policies.sticky:Sticky:window_s=60,rebalance=off
    └ a name of BUILT_IN            └ with parameters           └ imported, must speak POLICY_API

The interface is in api.py. What does not belong here: queueing, admission, and whether to disaggregate at all.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from enum import Enum
from typing import Any, get_type_hints

from protocol.errors import ConfigError
from router.policies.api import POLICY_API, Cost, PlacementPolicy, PlacementView, PolicyClass, Pool, Stateless, WorkerView
from router.policies.distserve import DistServe
from router.policies.e2 import E2
from router.policies.least_work import LeastWork
from router.policies.mooncake_ttft import MooncakeTtft
from router.policies.power_of_two import PowerOfTwo
from router.policies.prefix_cost import PrefixCost
from router.policies.random_worker import RandomWorker
from router.policies.round_robin import RoundRobin
from router.policies.session_affinity import SessionAffinity

__all__ = [
    "BUILT_IN",
    "POLICY_API",
    "Cost",
    "PlacementPolicy",
    "PlacementView",
    "PolicyClass",
    "Pool",
    "Stateless",
    "WorkerView",
    "label",
    "load",
    "split",
    "split_list",
]

BUILT_IN: dict[str, PolicyClass] = {
    "round_robin": RoundRobin,
    "least_work": LeastWork,
    "prefix_cost": PrefixCost,
    "e2": E2,
    "random": RandomWorker,
    "power_of_two": PowerOfTwo,
    "session_affinity": SessionAffinity,
    "mooncake_ttft": MooncakeTtft,
    "distserve": DistServe,
}

_BOOL_WORDS = {"on": True, "true": True, "yes": True, "1": True, "off": False, "false": False, "no": False, "0": False}


def load(spec: str) -> PlacementPolicy:
    """The policy `spec` names, with its parameters.

    Raises:
        ConfigError: unknown name or parameter (the text has the nearest known one), or a class that is no policy.
    """
    name, parameters = split(spec)
    cls = BUILT_IN[name] if name in BUILT_IN else _import(name)
    return cls(_config(name, parameters, _config_class(cls)))


def split(spec: str) -> tuple[str, str]:
    """Name (`NAME` or `module:Class`) and parameters (`k=v,...` or nothing) of a policy's text."""
    head, _, rest = spec.strip().partition(":")
    if head in BUILT_IN or "=" in rest.partition(":")[0]:
        return head, rest
    cls, _, parameters = rest.partition(":")
    return (f"{head}:{cls}" if cls else head), parameters


def split_list(text: str) -> list[str]:
    """Policies of a list; a part with "=" and no ":" continues the policy before it: `a:x=1,y=2,b` is two."""
    found: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if found and "=" in part and ":" not in part:
            found[-1] += f",{part}"
        else:
            found.append(part)
    return list(dict.fromkeys(found))


def label(spec: str) -> str:
    """Short, for tables: `examples.policies.sglang_like:SglangLike:k=1` is sglang_like:k=1."""
    name, parameters = split(spec)
    module, is_own, _ = name.partition(":")
    short = module.rpartition(".")[2] if is_own else name
    return f"{short}:{parameters}" if parameters else short


def _import(name: str) -> PolicyClass:
    module_name, _, class_name = name.partition(":")
    if not class_name:
        known = ", ".join(BUILT_IN)
        raise ConfigError(f"unknown policy {name!r}{_nearest(name, list(BUILT_IN))}; known are {known}, and module:Class for your own")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"policy {name!r}: cannot import {module_name!r} ({error}); is its folder on the Python path?") from error
    cls = getattr(module, class_name, None)
    if cls is None:
        raise ConfigError(f"policy {name!r}: {module_name} has no {class_name!r}{_nearest(class_name, dir(module))}")
    missing = [m for m in ("Config", "score", "observe", "commands", "snapshot", "restore") if not hasattr(cls, m)]
    if missing:
        raise ConfigError(f"policy {name!r} lacks {', '.join(missing)}; see router/policies/api.py (PlacementPolicy)")
    speaks = getattr(cls, "policy_api", POLICY_API)
    if speaks != POLICY_API:
        raise ConfigError(f"policy {name!r} speaks POLICY_API {speaks}, this router {POLICY_API}")
    return cls  # type: ignore[no-any-return]


def _config_class(cls: PolicyClass) -> type[Any]:
    config: type[Any] = inspect.getattr_static(cls, "Config")
    return config


def _config(policy: str, parameters: str, cls: type[Any]) -> Any:
    hints = get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    values: dict[str, object] = {}
    for part in filter(None, (p.strip() for p in parameters.split(","))):
        key, equals, text = (s.strip() for s in part.partition("="))
        if not equals:
            raise ConfigError(f"policy {policy!r}: {part!r} is not a parameter; write NAME:key=value,key=value")
        if key not in names:
            has = f"it has {', '.join(names)}" if names else "it has none"
            raise ConfigError(f"policy {policy!r} has no parameter {key!r}{_nearest(key, names)}; {has}")
        values[key] = _convert(policy, key, text, hints[key])
    return cls(**values)


def _convert(policy: str, key: str, text: str, hint: Any) -> object:
    try:
        if hint is bool:
            return _BOOL_WORDS[text.lower()]
        if isinstance(hint, type) and issubclass(hint, (int, float, str, Enum)):
            return hint(text)
    except (KeyError, ValueError):
        pass
    raise ConfigError(f"policy {policy!r}: {key}={text!r} is no {getattr(hint, '__name__', hint)}")


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
