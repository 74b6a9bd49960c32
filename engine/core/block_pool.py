"""Who holds which KV block: reference counts, the free list, the least recently used cached blocks, and generation numbers.

Each block is of exactly one kind, so that free + owned + leased + cached = total at every moment:

    OWNED    a sequence holds it, or a step in flight still names it (a pin)
    LEASED   only an offer to another worker holds it
    CACHED   nobody holds it, but the prefix cache knows its content; it may be taken back, least recently used first
    FREE     none of these

A generation grows each time a block is given out to be written anew, so a late reader of its old content fails closed.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from enum import IntEnum


class BlockKind(IntEnum):
    FREE = 0
    OWNED = 1
    LEASED = 2
    CACHED = 3


class BlockPool:
    """Counts of `num_blocks` blocks; knows nothing of their bytes."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0
        self.num_blocks = num_blocks
        self.on_evict: Callable[[int], None] = _nobody_caches  # the prefix cache forgets the block's name
        self._owners = [0] * num_blocks
        self._pins = [0] * num_blocks
        self._leases = [0] * num_blocks
        self._named = bytearray(num_blocks)  # 1: the prefix cache knows it
        self._generations = [0] * num_blocks
        self._free = deque(range(num_blocks))  # oldest first: reuse comes as late as possible
        self._lru: OrderedDict[int, None] = OrderedDict()  # CACHED blocks, next to be evicted first
        self._counts = [num_blocks, 0, 0, 0]  # by BlockKind
        self._num_retiring = 0  # pinned and otherwise unheld: available once their steps are done
        self._raised: dict[int, int] = {}

    # --- figures ---

    @property
    def num_free(self) -> int:
        return self._counts[BlockKind.FREE]

    @property
    def num_owned(self) -> int:
        return self._counts[BlockKind.OWNED]

    @property
    def num_leased(self) -> int:
        return self._counts[BlockKind.LEASED]

    @property
    def num_cached(self) -> int:
        return self._counts[BlockKind.CACHED]

    @property
    def num_available(self) -> int:
        """Blocks `allocate` can give now."""
        return self.num_free + self.num_cached

    @property
    def num_available_soon(self) -> int:
        """And once the steps in flight are done."""
        return self.num_available + self._num_retiring

    def kind(self, block_id: int) -> BlockKind:
        if self._owners[block_id] or self._pins[block_id]:
            return BlockKind.OWNED
        if self._leases[block_id]:
            return BlockKind.LEASED
        return BlockKind.CACHED if self._named[block_id] else BlockKind.FREE

    def generation(self, block_id: int) -> int:
        return self._generations[block_id]

    def is_shared(self, block_id: int) -> bool:
        """True when writing it would be seen by another sequence, a reader elsewhere, or the prefix cache."""
        return self._owners[block_id] > 1 or self._leases[block_id] > 0 or self._named[block_id] != 0

    # --- giving out ---

    def allocate(self, count: int) -> array[int]:
        """`count` blocks to be written anew, each owned once, with raised generations. The caller has seen `num_available`."""
        assert count <= self.num_available, f"{count} blocks asked, {self.num_available} available"
        block_ids = array("I")
        for _ in range(count):
            if not self._free:
                self._evict()
            block_id = self._free.popleft()
            assert self.kind(block_id) is BlockKind.FREE
            self._owners[block_id] = 1
            self._raised[block_id] = self._generations[block_id] = self._generations[block_id] + 1
            block_ids.append(block_id)
        self._counts[BlockKind.FREE] -= count
        self._counts[BlockKind.OWNED] += count
        return block_ids

    def take_raised(self) -> tuple[array[int], array[int]]:
        """Blocks (uint32) and generations (uint64) raised since the last call; they are written before the blocks are."""
        raised, self._raised = self._raised, {}
        return array("I", raised.keys()), array("Q", raised.values())

    # --- holding ---

    def own(self, block_id: int) -> None:
        """One more sequence holds a block that already has content."""
        assert self.kind(block_id) is not BlockKind.FREE
        self._change(block_id, self._owners, 1)

    def disown(self, block_id: int) -> None:
        self._change(block_id, self._owners, -1)

    def pin(self, block_id: int) -> None:
        """A step in flight names it."""
        assert self.kind(block_id) is BlockKind.OWNED
        self._change(block_id, self._pins, 1)

    def unpin(self, block_id: int) -> None:
        self._change(block_id, self._pins, -1)

    def lease(self, block_ids: Iterable[int]) -> None:
        """An offer keeps them."""
        for block_id in block_ids:
            assert self.kind(block_id) is BlockKind.OWNED
            self._change(block_id, self._leases, 1)

    def end_lease(self, block_ids: array[int]) -> None:
        for block_id in reversed(block_ids):
            self._change(block_id, self._leases, -1)

    def name(self, block_id: int) -> None:
        """The prefix cache knows its content from now on."""
        assert not self._named[block_id] and self.kind(block_id) is BlockKind.OWNED
        self._named[block_id] = 1

    def evict_cached(self) -> int:
        """Every block that only the prefix cache knows becomes free; how many there were."""
        count = len(self._lru)
        for _ in range(count):
            self._evict()
        return count

    # --- inside ---

    def _evict(self) -> None:
        block_id, _ = self._lru.popitem(last=False)
        self.on_evict(block_id)
        self._named[block_id] = 0
        self._counts[BlockKind.CACHED] -= 1
        self._counts[BlockKind.FREE] += 1
        self._free.append(block_id)

    def _change(self, block_id: int, counts: list[int], delta: int) -> None:
        before = self.kind(block_id)
        retiring = self._is_retiring(block_id)
        counts[block_id] += delta
        assert counts[block_id] >= 0, f"block {block_id} given back more often than taken"
        self._num_retiring += self._is_retiring(block_id) - retiring
        after = self.kind(block_id)
        if before is after:
            return
        self._counts[before] -= 1
        self._counts[after] += 1
        assert before is not BlockKind.FREE, "only `allocate` takes a free block"
        if before is BlockKind.CACHED:
            del self._lru[block_id]
        if after is BlockKind.FREE:
            self._free.append(block_id)
        elif after is BlockKind.CACHED:
            self._lru[block_id] = None

    def _is_retiring(self, block_id: int) -> bool:
        return bool(self._pins[block_id]) and not self._owners[block_id] and not self._leases[block_id]

    def check(self) -> None:
        """Assert the conservation law and that every list agrees with the counts. For tests: linear in the pool."""
        kinds = [self.kind(b) for b in range(self.num_blocks)]
        counted = [kinds.count(kind) for kind in BlockKind]
        assert counted == self._counts, f"counted {counted}, booked {self._counts}"
        assert sum(self._counts) == self.num_blocks
        assert sorted(self._free) == [b for b, kind in enumerate(kinds) if kind is BlockKind.FREE]
        assert sorted(self._lru) == [b for b, kind in enumerate(kinds) if kind is BlockKind.CACHED]
        assert self._num_retiring == sum(self._is_retiring(b) for b in range(self.num_blocks))


def _nobody_caches(block_id: int) -> None:
    raise AssertionError(f"block {block_id} is named but no prefix cache is bound")
