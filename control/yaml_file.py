"""Reads one YAML file as plain values, and remembers the line of each key so that an error can point at it.

Safe by construction: only scalars, lists and mappings are built (no tags), a key given twice is an error, and size and
number of nodes are bounded, so that aliases cannot blow up. `on`, `off`, `yes` and `no` are words here, not booleans.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from protocol.errors import ConfigError

FILE_BYTES_MAX = 1 << 20
NODES_MAX = 20_000
DEPTH_MAX = 32

KeyPath = tuple[str, ...]
Tree = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class YamlFile:
    """`lines` has the 1-based line of every key outside lists."""

    path: Path
    tree: Tree
    lines: dict[KeyPath, int]

    def place(self, path: KeyPath) -> str:
        """Where a reader finds `path`: "cluster.yaml:12"."""
        return f"{self.path}:{self.lines.get(path, 1)}"


def read_yaml(path: Path) -> YamlFile:
    """The mapping in the file at `path`; an empty file is an empty mapping.

    Raises:
        ConfigError: no such file, not YAML, not a mapping, a key twice, or beyond the bounds.
    """
    try:
        size_bytes = path.stat().st_size
        if size_bytes > FILE_BYTES_MAX:
            raise ConfigError(f"{path} has {size_bytes:,} bytes, the limit is {FILE_BYTES_MAX:,}; is it the configuration?")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError(f"cannot read the configuration {path}: {reason}; check --config") from None
    return parse_yaml(text, path)


def parse_yaml(text: str, path: Path) -> YamlFile:
    """As `read_yaml`, of text already read; `path` only names it in errors."""
    loader = _PlainLoader(text)
    try:
        node = loader.get_single_node()
        walk = _Walk(loader, path)
        tree = walk.value(node, (), 0) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        problem = ", ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
        raise ConfigError(f"{path}:{line}: {problem or 'not valid YAML'}") from None
    finally:
        loader.dispose()
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}:1: expected sections such as `model:` and `workers:`, found a {_kind(tree)}")
    return YamlFile(path=path, tree=tree, lines=walk.lines if node is not None else {})


class _PlainLoader(yaml.SafeLoader):
    """YAML 1.1 would read `off` as false and a date as an object; a configuration has no use for either."""


_PLAIN_COLLECTIONS = ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map")


def _is_plain(tag: str, first: str) -> bool:
    kind = tag.rsplit(":", 1)[1]
    return kind in ("int", "float", "null") or (kind == "bool" and first in "tTfF")


_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if _is_plain(tag, first)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Walk:
    """Node tree to plain values, counting nodes."""

    def __init__(self, loader: _PlainLoader, path: Path) -> None:
        self._loader = loader
        self._path = path
        self._num_nodes = 0
        self.lines: dict[KeyPath, int] = {}

    def value(self, node: yaml.Node, at: KeyPath, depth: int) -> object:
        self._num_nodes += 1
        if self._num_nodes > NODES_MAX or depth > DEPTH_MAX:
            raise ConfigError(f"{self._path}: more than {NODES_MAX:,} values or {DEPTH_MAX} levels; is it the configuration?")
        if isinstance(node, yaml.CollectionNode) and node.tag not in _PLAIN_COLLECTIONS:
            raise ConfigError(f"{self._path}:{node.start_mark.line + 1}: the tag {node.tag} means nothing here; remove it")
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*at, str(index)), depth + 1) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, at, depth)
        return self._loader.construct_object(node)

    def _mapping(self, node: yaml.MappingNode, at: KeyPath, depth: int) -> Tree:
        tree: Tree = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key, str):
                raise ConfigError(f"{self._path}:{line}: a key must be a word")
            if key in tree:
                raise ConfigError(f"{self._path}:{line}: {'.'.join((*at, key))} is given twice; remove one")
            self.lines[(*at, key)] = line
            tree[key] = self.value(value_node, (*at, key), depth + 1)
        return tree


def _kind(value: object) -> str:
    return "list" if isinstance(value, list) else "single value"
