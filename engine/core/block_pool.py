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
        free, owners, generations, raised = self._free, self._owners, self._generations, self._raised
        while len(free) < count:
            self._evict()
        block_ids = array("I", [free.popleft() for _ in range(count)])
        for block_id in block_ids:
            assert not owners[block_id] and not self._named[block_id], "a block in the free list is in use"
            owners[block_id] = 1
            raised[block_id] = generations[block_id] = generations[block_id] + 1
        self._counts[BlockKind.FREE] -= count
        self._counts[BlockKind.OWNED] += count
        return block_ids

    def take_raised(self) -> tuple[array[int], array[int]]:
        """Blocks (uint32) and generations (uint64) raised since the last call; they are written before the blocks are."""
        raised, self._raised = self._raised, {}
        return array("I", raised.keys()), array("Q", raised.values())

    # --- holding ---

    # Each of these looks at one count only: where it stays above zero, the block's kind stays what it is.

    def own(self, block_id: int) -> None:
        """One more sequence holds a block that already has content."""
        count = self._owners[block_id]
        self._owners[block_id] = count + 1
        if count == 0:
            if self._pins[block_id]:
                self._num_retiring -= not self._leases[block_id]
                return
            self._counts[BlockKind.OWNED] += 1
            if self._leases[block_id]:
                self._counts[BlockKind.LEASED] -= 1
            else:
                assert self._named[block_id], "only `allocate` takes a free block"
                self._counts[BlockKind.CACHED] -= 1
                del self._lru[block_id]

    def disown(self, block_id: int) -> None:
        count = self._owners[block_id] - 1
        assert count >= 0, f"block {block_id} given back more often than taken"
        self._owners[block_id] = count
        if count == 0:
            if self._pins[block_id]:
                self._num_retiring += not self._leases[block_id]
            else:
                self._let_go(block_id, BlockKind.OWNED)

    def pin(self, block_id: int) -> None:
        """A step in flight names it."""
        assert self._owners[block_id] or self._pins[block_id]
        self._pins[block_id] += 1

    def unpin(self, block_id: int) -> None:
        count = self._pins[block_id] - 1
        assert count >= 0, f"block {block_id} given back more often than taken"
        self._pins[block_id] = count
        if count == 0 and not self._owners[block_id]:
            self._num_retiring -= not self._leases[block_id]
            self._let_go(block_id, BlockKind.OWNED)

    def lease(self, block_ids: Iterable[int]) -> None:
        """An offer keeps them."""
        for block_id in block_ids:
            count = self._leases[block_id]
            self._leases[block_id] = count + 1
            if not self._owners[block_id]:
                assert self._pins[block_id], "nobody holds what is leased"
                self._num_retiring -= count == 0

    def end_lease(self, block_ids: array[int]) -> None:
        for block_id in reversed(block_ids):
            count = self._leases[block_id] - 1
            assert count >= 0, f"block {block_id} given back more often than taken"
            self._leases[block_id] = count
            if count == 0 and not self._owners[block_id]:
                if self._pins[block_id]:
                    self._num_retiring += 1
                else:
                    self._let_go(block_id, BlockKind.LEASED)

    def name(self, block_id: int) -> None:
        """The prefix cache knows its content from now on."""
        assert not self._named[block_id] and (self._owners[block_id] or self._pins[block_id])
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

    def _let_go(self, block_id: int, before: BlockKind) -> None:
        """Nobody owns or pins it any more; `before`: what it was until now."""
        counts = self._counts
        counts[before] -= 1
        if self._leases[block_id]:
            counts[BlockKind.LEASED] += 1
        elif self._named[block_id]:
            counts[BlockKind.CACHED] += 1
            self._lru[block_id] = None
        else:
            counts[BlockKind.FREE] += 1
            self._free.append(block_id)

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
