"""Which prompts begin alike: a radix tree over block hashes, bounded in blocks and nodes.

    prompts  A B C D        root ── A B ─┬─ C D
             A B E                       └─ E ── F G
             A B E F G

A node is a run of blocks that all requests below it share. A hash names its whole prefix, so one table finds the node of any block, and
the longest known beginning of a prompt is found by bisection. When the tree is full its coldest leaves go.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

Record = TypeVar("Record")

MAX_PATH = 128  # nodes of one prompt that are touched, from its end: an agent's turns, not an adversary's


class Node(Generic[Record]):
    """Blocks `start` .. `end` of the prompts that run through here. `record`: what the owner of the tree knows of them."""

    __slots__ = ("children", "hashes", "parent", "record", "start")

    def __init__(self, parent: Node[Record] | None, start: int, hashes: tuple[bytes, ...], record: Record) -> None:
        self.parent = parent
        self.start = start
        self.hashes = hashes
        self.record = record
        self.children: dict[bytes, Node[Record]] = {}

    @property
    def end(self) -> int:
        return self.start + len(self.hashes)

    @property
    def name(self) -> bytes:
        """The hash of its last block: the name of everything up to here."""
        return self.hashes[-1]

    @property
    def is_large(self) -> bool:
        """It has more blocks than all its ancestors together."""
        return len(self.hashes) > self.start

    def up(self, limit: int = MAX_PATH) -> Iterator[Node[Record]]:
        """Itself and its ancestors, deepest first, without the root; `limit` nodes at most."""
        node: Node[Record] | None = self
        while node is not None and node.parent is not None and limit:
            yield node
            node, limit = node.parent, limit - 1


class PrefixTree(Generic[Record]):
    """`make` makes the record of a new node. `on_split(upper, lower)`: a run was cut in two and `upper` is new. `on_drop`: a leaf goes."""

    def __init__(
        self,
        *,
        max_blocks: int,
        max_nodes: int,
        make: Callable[[], Record],
        on_split: Callable[[Node[Record], Node[Record]], None],
        on_drop: Callable[[Node[Record]], None],
    ) -> None:
        self._max_blocks, self._max_nodes = max_blocks, max_nodes
        self._make, self._on_split, self._on_drop = make, on_split, on_drop
        self._root: Node[Record] = Node(None, 0, (), make())
        self._node_of: dict[bytes, Node[Record]] = {}
        self._coldest: OrderedDict[Node[Record], None] = OrderedDict()

    def __iter__(self) -> Iterator[Node[Record]]:
        """All nodes, the coldest first."""
        return iter(self._coldest)

    @property
    def num_blocks(self) -> int:
        return len(self._node_of)

    def node_of(self, block_hash: bytes) -> Node[Record] | None:
        return self._node_of.get(block_hash)

    def count(self, hashes: Iterable[bytes]) -> dict[Node[Record], int]:
        """How many of these blocks each node has, in the order of its first; blocks of no prompt are passed over."""
        found = Counter(map(self._node_of.get, hashes))  # at C speed: a worker tells of thousands at once
        return {node: count for node, count in found.items() if node is not None}

    def find(self, hashes: Sequence[bytes]) -> Node[Record] | None:
        """The node in which the longest known beginning of the prompt ends."""
        return self.match(hashes)[1]

    def match(self, hashes: Sequence[bytes]) -> tuple[int, Node[Record] | None]:
        """Blocks of the longest known beginning of the prompt, and the node in which it ends."""
        known = self._num_known(hashes)
        return known, self._node_of[hashes[known - 1]] if known else None

    def insert(self, hashes: Sequence[bytes]) -> Node[Record] | None:
        """The node that ends where the prompt does, made where there was none; None for a prompt without blocks.

        Of a prompt longer than the whole tree may be, the beginning.
        """
        hashes = hashes[: self._max_blocks]
        if not hashes:
            return None
        self._make_room(len(hashes))
        known = self._num_known(hashes)
        node = self._node_of[hashes[known - 1]] if known else self._root
        if known < node.end:
            node = self._split(node, known)
        if known < len(hashes):
            node = self._add(node, tuple(hashes[known:]))
        for touched in node.up():
            self._coldest.move_to_end(touched)
        return node

    def _num_known(self, hashes: Sequence[bytes]) -> int:
        node_of = self._node_of
        # Leaves go first, so what is known of a prompt is a beginning of it.
        return bisect_left(range(len(hashes)), True, key=lambda index: hashes[index] not in node_of)

    def _add(self, parent: Node[Record], hashes: tuple[bytes, ...]) -> Node[Record]:
        node = Node(parent, parent.end, hashes, self._make())
        parent.children[hashes[0]] = node
        self._node_of.update(dict.fromkeys(hashes, node))
        self._coldest[node] = None
        return node

    def _split(self, lower: Node[Record], at: int) -> Node[Record]:
        """Cut `lower` after `at` blocks of the prompt; returns the new upper part."""
        parent = lower.parent
        assert parent is not None and lower.start < at < lower.end
        cut = at - lower.start
        upper = Node(parent, lower.start, lower.hashes[:cut], self._make())
        parent.children[upper.hashes[0]] = upper
        lower.parent, lower.start, lower.hashes = upper, at, lower.hashes[cut:]
        upper.children[lower.hashes[0]] = lower
        self._node_of.update(dict.fromkeys(upper.hashes, upper))
        self._coldest[upper] = None
        self._on_split(upper, lower)
        return upper

    def _make_room(self, num_blocks: int) -> None:
        # An insertion adds two nodes at most: a run cut in two, and what is new.
        while self._coldest and (len(self._node_of) + num_blocks > self._max_blocks or len(self._coldest) + 2 > self._max_nodes):
            coldest = next(iter(self._coldest))
            if coldest.children:  # deeper than MAX_PATH: its descendants were touched and it was not
                self._coldest.move_to_end(coldest)
            else:
                self._drop(coldest)

    def _drop(self, leaf: Node[Record]) -> None:
        assert leaf.parent is not None
        del leaf.parent.children[leaf.hashes[0]], self._coldest[leaf]
        for block_hash in leaf.hashes:
            del self._node_of[block_hash]
        self._on_drop(leaf)

    # --- to another process ---

    def runs(self) -> list[tuple[int, tuple[bytes, ...], Record]]:
        """All of it, coldest first: index of the parent (-1: the root), blocks, record."""
        index = {node: i for i, node in enumerate(self._coldest)}
        return [(index.get(node.parent, -1) if node.parent is not None else -1, node.hashes, node.record) for node in self._coldest]

    def restore(self, runs: Sequence[tuple[int, tuple[bytes, ...], Record]]) -> None:
        """Into an empty tree: what `runs` told."""
        assert not self._coldest, "a tree that has nodes"
        nodes = [Node(self._root, 0, hashes, record) for _, hashes, record in runs]
        for node, (parent, _, _) in zip(nodes, runs, strict=True):
            node.parent = nodes[parent] if parent >= 0 else self._root
            node.parent.children[node.hashes[0]] = node
            self._node_of.update(dict.fromkeys(node.hashes, node))
            self._coldest[node] = None
        for node in nodes:
            node.start = sum(len(above.hashes) for above in node.up(len(nodes))) - len(node.hashes)
