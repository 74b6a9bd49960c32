"""Which blocks evicted from the pool still lie in host memory, in which slot; and the loads that bring them back.

    evicted from the pool ─► save into a slot, before the block is written anew ─► least recently used slot goes first
    a prompt comes ─► cached in the pool, then in slots? ─► blocks of the pool, filled from the slots ─► prefix cache ─► next stage

A slot is found by the name of its block, and counts only when the tokens of the block and of everything before it are compared. Slots
being read are not reused; each reuse raises the slot's generation, and the driver asserts it before and after it reads.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass

from engine.core.config import WorkerCoreConfig
from engine.core.kv_log import KvLog
from engine.core.landing import Prefix
from engine.core.prefix_cache import CachedBlock
from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.kv import KVLayout
from protocol.worker import Tier

SAVED_BYTES_MAX = 64 << 20  # of one turn: the driver's loop stands still for their copy


@dataclass(slots=True, kw_only=True, eq=False)
class SlotEntry:
    """The content of one slot."""

    slot: int
    generation: int
    block: CachedBlock  # as it was in the pool; its chain of parents says what lies before it
    num_readers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Saves:
    """Copies from the pool to slots, entry by entry."""

    block_ids: array[int]
    slots: array[int]
    generations: array[int]  # uint64: of the slots, from now on


class HostTier:
    """Slots of one worker, bounded by `num_slots`; knows nothing of their bytes."""

    def __init__(self, num_slots: int, log: KvLog, *, block_size_tokens: int, num_saves_max: int) -> None:
        """num_saves_max: of one turn, since saving takes the driver's time; further blocks are let go."""
        self.num_slots = num_slots
        self._num_saves_max = num_saves_max
        self._log = log
        self._size = block_size_tokens
        self._hashes_per_block = block_size_tokens // HASH_BLOCK_SIZE_TOKENS
        self._entries: OrderedDict[bytes, SlotEntry] = OrderedDict()  # by name; next to go first
        self._free = deque(range(num_slots))
        self._generations = [0] * num_slots
        self._saves: dict[int, int] = {}  # slot -> block, since the last `take_saves`
        self._came: dict[bytes, CachedBlock] = {}  # since the last `take_saves`
        self.num_saved = 0

    @classmethod
    def of(cls, config: WorkerCoreConfig, layout: KVLayout, log: KvLog) -> HostTier:
        """As many slots as the configured bytes hold; none when it is off."""
        block_bytes = layout.block_bytes
        return cls(
            config.host_tier_bytes // block_bytes,
            log,
            block_size_tokens=layout.block_size_tokens,
            num_saves_max=max(1, SAVED_BYTES_MAX // block_bytes),
        )

    def __len__(self) -> int:
        return len(self._entries)

    def save(self, block: CachedBlock) -> None:
        """The pool is about to reuse this block. Not saved when every slot is being read, or enough was saved in this turn."""
        known = self._entries.get(block.name)
        if known is not None and _is_same(known.block, block):
            self._entries.move_to_end(block.name)
            return
        if len(self._saves) >= self._num_saves_max or (known is not None and known.num_readers):
            return
        if known is not None:
            self._drop(known)
        if not self._free and not self._make_room():
            return
        slot = self._free.popleft()
        self._generations[slot] += 1
        self._entries[block.name] = SlotEntry(slot=slot, generation=self._generations[slot], block=block)
        self._came[block.name] = block
        self._saves[slot] = block.block_id
        self.num_saved += 1

    def take_saves(self) -> Saves | None:
        """Copies to be made before any block is written anew, one a slot; and their events go to the log."""
        for block in reversed(self._came.values()):  # evicted children first, told parents first
            self._log.store(Tier.HOST, block.before, block.hashes)
        self._came = {}
        if not self._saves:
            return None
        saves, self._saves = self._saves, {}
        generations = array("Q", [self._generations[slot] for slot in saves])
        return Saves(block_ids=array("I", saves.values()), slots=array("I", saves), generations=generations)

    def find(self, prefix: Prefix, found: list[CachedBlock]) -> list[SlotEntry]:
        """The slots that continue `prefix` behind the blocks found in the pool."""
        run: list[SlotEntry] = []
        tokens, size = prefix.token_ids, self._size
        parent = found[-1] if found else None
        for index in range(len(found), len(tokens) // size):
            entry = self._entries.get(prefix.hashes[(index + 1) * self._hashes_per_block - 1])
            if entry is None or entry.block.token_ids != tokens[index * size : (index + 1) * size].tobytes():
                break
            if entry.block.parent is not parent and not self._is_chain(entry.block, prefix, index):
                break
            if parent is None and entry.block.before != prefix.cache_root:
                break
            run.append(entry)
            parent = entry.block
        return run

    def hold(self, run: list[SlotEntry]) -> None:
        """Somebody reads them."""
        for entry in reversed(run):
            entry.num_readers += 1
            self._entries.move_to_end(entry.block.name)  # the first of a run goes last

    def let_go(self, run: list[SlotEntry]) -> None:
        for entry in run:
            entry.num_readers -= 1
            assert entry.num_readers >= 0, "a slot let go more often than held"

    def clear(self) -> None:
        """Drop every entry that nobody reads."""
        for entry in [entry for entry in self._entries.values() if not entry.num_readers]:
            self._drop(entry)

    def check(self, *, num_readers: int) -> None:
        """Assert that every slot is free or of one entry, and that so many readers are known. For tests: linear."""
        assert sum(entry.num_readers for entry in self._entries.values()) == num_readers, "a slot is read by nobody that lives, or went"
        used = [entry.slot for entry in self._entries.values()]
        assert sorted(used + list(self._free)) == list(range(self.num_slots)), "slots lost, or of two entries"
        assert all(entry.generation == self._generations[entry.slot] for entry in self._entries.values())

    # --- inside ---

    def _is_chain(self, block: CachedBlock, prefix: Prefix, index: int) -> bool:
        """True when what lay before `block` are the first `index` blocks of `prefix`, by their tokens and their root."""
        tokens, size = prefix.token_ids, self._size
        node, place = block, index
        while node.parent is not None and place > 0:
            node, place = node.parent, place - 1
            if node.token_ids != tokens[place * size : (place + 1) * size].tobytes():
                return False
        return node.parent is None and place == 0 and node.before == prefix.cache_root

    def _make_room(self) -> bool:
        """Drop the least recently used entry that nobody reads."""
        victim = next((entry for entry in self._entries.values() if not entry.num_readers), None)
        if victim is None:
            return False
        self._drop(victim)
        return True

    def _drop(self, entry: SlotEntry) -> None:
        name = entry.block.name
        del self._entries[name]
        self._free.append(entry.slot)
        self._saves.pop(entry.slot, None)
        if self._came.pop(name, None) is None:
            self._log.remove(Tier.HOST, entry.block.hashes)


def _is_same(mine: CachedBlock, other: CachedBlock) -> bool:
    """Equal content, down to the root."""
    left: CachedBlock | None = mine
    right: CachedBlock | None = other
    while left is not right:
        if left is None or right is None or left.token_ids != right.token_ids or left.before != right.before:
            return False
        left, right = left.parent, right.parent
    return True
