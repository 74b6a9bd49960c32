"""Which worker holds which prefix: confirmed by its numbered KV events, guessed for two seconds after a booking.

    masks[hash] = set of workers as the bits of one int; bit i belongs to the worker in slot i

A match finds for each worker how many leading blocks of a chain it holds, in one of two ways:

    search   where no worker holds a block without its parents, the masks only lose bits along the chain: halved again and again
             wherever two ends differ, it shows the depth of all workers at once, in some 10 looks where a walk takes 256.
    walk     along the whole chain, keeping who holds every block so far: exact whatever the workers hold. It runs at C speed in
             strides and stops at the first stride nobody survives.

Our workers evict children before their parents and tell parents before their children; a guess is a chain from its start. So the walk
is for foreign engines, for a worker of whose blocks some were not taken or not told, and for chains with blocks in a host tier.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate, filterfalse, pairwise, repeat
from math import inf
from operator import and_, or_

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.messages import KvEvents, KvSnapshot
from protocol.worker import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier, WorkerId

# By tracemalloc on CPython 3.11, over 0.3 to 1 M blocks of 64 and of 1,024 workers: 145 to 170 bytes for a block of one worker, 95 to 110
# for each further one, and 15 more of each that the allocator rounds a hash up by. Tables are between one and two thirds full; neighbours
# in a chain share a mask. `baton bench router` tells what a process grows by.
ENTRY_BYTES = 60  # a slot of a dict
PAIR_BYTES = 125  # one (worker, hash): the hash as that worker told it and a slot of a set; for a guess a slot of a dict
_STRIDE = 64  # of the walk
_GROUP_BITS = 8  # slots whose workers are named together


@dataclass(slots=True, kw_only=True)
class _Holdings:
    """What one incarnation of a worker holds."""

    worker_id: WorkerId
    epoch: int
    slot: int
    bit: int
    next_number: int | None = None  # None: whatever comes first
    device: set[bytes] = field(default_factory=set)
    host: set[bytes] = field(default_factory=set)
    guesses: dict[bytes, float] = field(default_factory=dict)  # hash -> when the guess ends


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Leading tokens of one chain that each worker holds; workers with none are left out."""

    device_tokens: dict[WorkerId, int]
    total_tokens: dict[WorkerId, int]  # with blocks of the host tier; the same object when there are none


class PrefixIndex:
    """The router's picture of every prefix cache, bounded by `max_bytes` (by estimate).

    When it is full, new entries are not taken and counted in `num_dropped`: a match may then be too short, never wrong.
    `prefix_closed`: the workers' events promise that none ever holds a block without its parents.
    """

    def __init__(self, *, max_bytes: int, speculative_ttl_s: float, prefix_closed: bool = False) -> None:
        self._max_bytes = max_bytes
        self._ttl_s = speculative_ttl_s
        self._prefix_closed = prefix_closed
        self._device: dict[bytes, int] = {}
        self._host: dict[bytes, int] = {}
        self._holdings: dict[WorkerId, _Holdings] = {}
        self._slots: list[_Holdings | None] = []
        self._live = 0
        self._open = 0  # workers that may be believed to hold a block and not its parents, for what was not taken or not told
        self._named: dict[tuple[int, int], tuple[WorkerId, ...]] = {}  # (group of slots, bits in it): who they are
        self._num_pairs = 0
        self._guesses: deque[tuple[float, _Holdings, Sequence[bytes]]] = deque()
        self._unmarked: list[tuple[float, _Holdings, Sequence[bytes], int]] = []  # (end, who, chain, blocks marked already)
        self.num_dropped = 0
        self.num_gaps = 0

    # --- workers ---

    def join(self, worker_id: WorkerId, epoch: int) -> None:
        """A worker, or a new incarnation of it, that holds nothing yet."""
        self.leave(worker_id)
        slot = next((i for i, h in enumerate(self._slots) if h is None), len(self._slots))
        if slot == len(self._slots):
            self._slots.append(None)
        holdings = _Holdings(worker_id=worker_id, epoch=epoch, slot=slot, bit=1 << slot)
        self._slots[slot] = self._holdings[worker_id] = holdings
        self._live |= holdings.bit
        self._named.clear()

    def leave(self, worker_id: WorkerId) -> None:
        self.catch_up()
        holdings = self._holdings.pop(worker_id, None)
        if holdings is None:
            return
        self._clear(holdings)
        self._drop_guesses(holdings)
        self._live &= ~holdings.bit
        self._slots[holdings.slot] = None
        self._named.clear()

    def next_number(self, worker_id: WorkerId) -> int:
        """Of the first KV event not seen from this worker; 0 when none was."""
        holdings = self._holdings.get(worker_id)
        return (holdings.next_number or 0) if holdings is not None else 0

    def has_heard(self, worker_id: WorkerId) -> bool:
        """True once the worker has told what it holds."""
        holdings = self._holdings.get(worker_id)
        return holdings is not None and holdings.next_number is not None

    # --- what workers say ---

    def apply(self, frame: KvEvents) -> tuple[tuple[KvEvent, ...], bool]:
        """Take numbered events in, in order, each once.

        Returns those taken, and False when one is missing after them, so that a resync from `next_number` is due.
        """
        self.catch_up()
        holdings = self._holdings.get(frame.worker_id)
        if holdings is None or holdings.epoch != frame.epoch:
            return (), True
        taken: list[KvEvent] = []
        for event in frame.events:
            if holdings.next_number is not None and event.number < holdings.next_number:
                continue
            if holdings.next_number is not None and event.number > holdings.next_number:
                self.num_gaps += 1
                return tuple(taken), False
            if holdings.next_number is None and event.number > 1:
                self._open |= holdings.bit  # it told of the parents to somebody else
            holdings.next_number = event.number + 1
            if isinstance(event, BlocksStored):
                self._store(holdings, event.hashes, event.tier)
            elif isinstance(event, BlocksRemoved):
                self._remove(holdings, event.hashes, event.tier)
            elif isinstance(event, AllBlocksCleared):
                self._clear(holdings)
            taken.append(event)
        return tuple(taken), True

    def replace(self, frame: KvSnapshot) -> bool:
        """Everything a worker holds, in place of what was believed. False: it speaks of another incarnation."""
        holdings = self._holdings.get(frame.worker_id)
        if holdings is None or holdings.epoch != frame.epoch:
            return False
        self.catch_up()
        self._remove(holdings, holdings.device.difference(frame.hashes), Tier.DEVICE)
        self._remove(holdings, holdings.host.difference(frame.host_hashes), Tier.HOST)
        self._open &= ~holdings.bit
        self._store(holdings, frame.hashes, Tier.DEVICE)
        self._store(holdings, frame.host_hashes, Tier.HOST)
        holdings.next_number = frame.next_event_number
        return True

    def missed_tail(self, worker_id: WorkerId, last_event_number: int) -> bool:
        """True when the worker has sent an event that should have arrived before the snapshot that says so."""
        holdings = self._holdings.get(worker_id)
        return holdings is not None and holdings.next_number is not None and last_event_number >= holdings.next_number

    # --- what a booking lets us expect ---

    def speculate(self, worker_id: WorkerId, hashes: Sequence[bytes], now: float, *, num_held: int = 0) -> None:
        """The worker will soon hold `hashes` (a chain from its start); believed until confirmed or the time is over.

        `num_held`: as many leading ones matched already, which saves the work of marking them. Marking waits for `catch_up` or
        the next call of anything else here, whichever is first.
        """
        holdings = self._holdings.get(worker_id)
        if holdings is not None and hashes and self._ttl_s > 0.0:
            self._unmarked.append((now + self._ttl_s, holdings, hashes, num_held))

    def catch_up(self) -> None:
        """Mark what was speculated: some 30 us for a prompt of 4k tokens, so better done once the answer is out."""
        unmarked, self._unmarked = self._unmarked, []
        for expires_s, holdings, hashes, num_held in unmarked:
            if self.size_bytes + (len(hashes) - num_held) * ENTRY_BYTES + len(hashes) * PAIR_BYTES > self._max_bytes:
                self.num_dropped += len(hashes)
                continue
            num_before = len(holdings.guesses)
            holdings.guesses.update(dict.fromkeys(hashes, expires_s))
            self._num_pairs += len(holdings.guesses) - num_before
            self._guesses.append((expires_s, holdings, hashes))
            new, masks, bit = hashes[num_held:], self._device, holdings.bit
            before = list(map(masks.get, new))
            if before.count(None) == len(before):
                masks.update(dict.fromkeys(new, bit))  # one int for all of them
            else:
                masks.update(zip(new, map(or_, map(masks.get, new, repeat(0)), repeat(bit)), strict=False))

    def expire(self, now: float) -> None:
        """Drop guesses whose time is over."""
        self.catch_up()
        while self._guesses and self._guesses[0][0] <= now:
            _, holdings, hashes = self._guesses.popleft()
            ends = map(holdings.guesses.get, hashes, repeat(inf))
            over = [h for h, end_s in zip(hashes, ends, strict=True) if end_s <= now]
            for h in over:
                del holdings.guesses[h]
            self._num_pairs -= len(over)
            self._clear_bits(self._device, filterfalse(holdings.device.__contains__, over), holdings.bit)

    def forget_guesses(self) -> None:
        """Believe only what workers have told."""
        self.catch_up()
        self._guesses.clear()
        for holdings in self._holdings.values():
            self._drop_guesses(holdings)

    # --- asking ---

    def match(self, hashes: Sequence[bytes]) -> Match:
        """Cached leading tokens by worker."""
        self.catch_up()
        tokens = self._search(hashes) if self._prefix_closed and not self._open else self._walk(hashes, self._device)
        if not self._host or self._host.keys().isdisjoint(hashes):
            return Match(device_tokens=tokens, total_tokens=tokens)
        get_device, get_host = self._device.get, self._host.get
        either = {h: get_device(h, 0) | get_host(h, 0) for h in hashes}
        return Match(device_tokens=tokens, total_tokens=self._walk(hashes, either))

    def confirmed_tokens(self, worker_id: WorkerId, hashes: Sequence[bytes], num_tokens: int) -> int:
        """How many of the first `num_tokens`, which `match` believes to be there, the worker itself has told of: no guesses.

        The last token of a prompt is computed whatever is cached, so the last block may be asked for but for a token.
        """
        holdings = self._holdings.get(worker_id)
        if holdings is None:
            return 0
        device, num_blocks = holdings.device, min(len(hashes), -(-num_tokens // HASH_BLOCK_SIZE_TOKENS))
        if self._prefix_closed and not self._open & holdings.bit:  # what it told of is a beginning
            if num_blocks and hashes[num_blocks - 1] in device:
                return min(num_tokens, num_blocks * HASH_BLOCK_SIZE_TOKENS)
            return bisect_left(range(num_blocks), True, key=lambda index: hashes[index] not in device) * HASH_BLOCK_SIZE_TOKENS
        found = next((i for i in range(num_blocks) if hashes[i] not in device), num_blocks)
        return min(num_tokens, found * HASH_BLOCK_SIZE_TOKENS)

    def told_by(self, worker_id: WorkerId) -> KvSnapshot | None:
        """What a worker has told that it holds, in any order; None for one that has told nothing yet."""
        holdings = self._holdings.get(worker_id)
        if holdings is None or holdings.next_number is None:
            return None
        return KvSnapshot(
            worker_id=worker_id,
            epoch=holdings.epoch,
            next_event_number=holdings.next_number,
            hashes=tuple(holdings.device),
            parents=(),
            host_hashes=tuple(holdings.host),
        )

    @property
    def num_entries(self) -> int:
        return len(self._device) + len(self._host)

    @property
    def num_pairs(self) -> int:
        """Of a worker and a block it is believed to hold."""
        return self._num_pairs

    @property
    def size_bytes(self) -> int:
        return self.num_entries * ENTRY_BYTES + self._num_pairs * PAIR_BYTES

    def _search(self, hashes: Sequence[bytes]) -> dict[WorkerId, int]:
        tokens: dict[WorkerId, int] = {}
        get = self._device.get
        first = get(hashes[0], 0) if hashes else 0
        if not first:
            return tokens
        last = get(hashes[-1], 0)
        # Runs of blocks whose ends differ in their holders, the leftmost on top: (low, high, holders of low, holders of high).
        runs = [(0, len(hashes) - 1, first, last)] if first != last else []
        while runs:
            low, high, before, after = runs.pop()
            while high - low > 1:
                middle = (low + high) >> 1
                mask = get(hashes[middle], 0)
                if mask == before:
                    low = middle
                else:
                    if mask != after:
                        runs.append((middle, high, mask, after))
                    high, after = middle, mask
            self._name(before & ~after, high, tokens)
        self._name(last, len(hashes), tokens)
        return tokens

    def _walk(self, hashes: Sequence[bytes], masks: dict[bytes, int]) -> dict[WorkerId, int]:
        tokens: dict[WorkerId, int] = {}
        if not hashes or hashes[0] not in masks:
            return tokens
        alive, get = self._live, masks.get
        for start in range(0, len(hashes), _STRIDE):
            holders = list(map(get, hashes[start : start + _STRIDE], repeat(0)))
            if holders.count(holders[0]) == len(holders):  # the same int throughout, mostly: nothing to fold
                after = alive & holders[0]
                if after != alive and start:
                    self._name(alive & ~after, start, tokens)
                alive = after
                if not alive:
                    return tokens
                continue
            if reduce(and_, holders, alive) == alive:
                continue
            # survivors: workers that hold every block before start, before start + 1, ...
            survivors = accumulate(holders, and_, initial=alive)
            for depth, (before, after) in enumerate(pairwise(survivors), start):
                if before != after and depth:
                    self._name(before & ~after, depth, tokens)
                alive = after
            if not alive:
                return tokens
        self._name(alive, len(hashes), tokens)
        return tokens

    def _name(self, mask: int, depth: int, tokens: dict[WorkerId, int]) -> None:
        """The workers of `mask` hold `depth` blocks."""
        num_tokens = depth * HASH_BLOCK_SIZE_TOKENS
        for group, bits in enumerate(mask.to_bytes((mask.bit_length() + 7) // 8, "little")):
            if bits:
                for worker_id in self._named.get((group, bits)) or self._workers_of(group, bits):
                    tokens[worker_id] = num_tokens

    def _workers_of(self, group: int, bits: int) -> tuple[WorkerId, ...]:
        of_group = self._slots[group * _GROUP_BITS : (group + 1) * _GROUP_BITS]
        assert all(holdings is not None for i, holdings in enumerate(of_group) if bits >> i & 1), "a bit of a worker that left"
        names = tuple([holdings.worker_id for i, holdings in enumerate(of_group) if bits >> i & 1 and holdings is not None])
        self._named[group, bits] = names
        return names

    # --- changing ---

    def _store(self, holdings: _Holdings, hashes: Iterable[bytes], tier: Tier) -> None:
        masks, held = (self._device, holdings.device) if tier is Tier.DEVICE else (self._host, holdings.host)
        new = list(filterfalse(held.__contains__, hashes))
        room = max(0, (self._max_bytes - self.size_bytes) // (ENTRY_BYTES + PAIR_BYTES))
        if len(new) > room:
            self.num_dropped += len(new) - room
            self._open |= holdings.bit  # a child may yet come
            del new[room:]
        num_before = len(held)
        held.update(new)
        self._num_pairs += len(held) - num_before
        self._set_bits(masks, new, holdings.bit)

    def _remove(self, holdings: _Holdings, hashes: Iterable[bytes], tier: Tier) -> None:
        masks, held = (self._device, holdings.device) if tier is Tier.DEVICE else (self._host, holdings.host)
        guesses = holdings.guesses if tier is Tier.DEVICE else {}
        gone = list(filter(held.__contains__, hashes))
        num_before = len(held)
        held.difference_update(gone)
        self._num_pairs -= num_before - len(held)
        self._clear_bits(masks, filterfalse(guesses.__contains__, gone) if guesses else gone, holdings.bit)

    @staticmethod
    def _set_bits(masks: dict[bytes, int], hashes: list[bytes], bit: int) -> None:
        known = list(map(masks.get, hashes))
        if known.count(None) == len(known):
            masks.update(dict.fromkeys(hashes, bit))  # one int for all of them
            return
        before, after = None, bit  # neighbours in a chain mostly have the same holders, and then share one int
        for h, mask in zip(hashes, known, strict=True):
            if mask is not before:
                before, after = mask, bit if mask is None else mask | bit
            masks[h] = after

    @staticmethod
    def _clear_bits(masks: dict[bytes, int], hashes: Iterable[bytes], bit: int) -> None:
        before, after = bit, 0  # as in `_set_bits`
        for h in hashes:
            mask = masks.get(h, 0)
            if mask is not before:
                before, after = mask, mask & ~bit
            if after:
                masks[h] = after
            elif mask:
                del masks[h]

    def _drop_guesses(self, holdings: _Holdings) -> None:
        self._clear_bits(self._device, filterfalse(holdings.device.__contains__, holdings.guesses), holdings.bit)
        self._num_pairs -= len(holdings.guesses)
        holdings.guesses.clear()

    def _clear(self, holdings: _Holdings) -> None:
        self._remove(holdings, list(holdings.device), Tier.DEVICE)
        self._remove(holdings, list(holdings.host), Tier.HOST)
        self._open &= ~holdings.bit
