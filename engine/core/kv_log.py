"""What the router is told of our cached prefixes: one numbered line of events over all tiers, in hash blocks.

A KV block may hold several hash blocks, and two KV blocks may begin alike, so a hash block is told of when the first KV block that holds
it comes and when the last one goes. Runs of one chain become one event.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import KvSnapshot
from protocol.worker import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier, WorkerId


class KvLog:
    """Events of one worker, gathered until they are taken. Bounded by what the tiers hold."""

    def __init__(self) -> None:
        self.last_number = 0
        self._held: dict[Tier, dict[bytes, bytes]] = {tier: {} for tier in Tier}  # name -> the hash in front of it
        self._again: dict[Tier, dict[bytes, int]] = {tier: {} for tier in Tier}  # how many more blocks hold it than one
        self._stored: _Run | None = None  # event being gathered
        self._removed: list[bytes] = []
        self._removed_tier = Tier.DEVICE
        self._events: list[KvEvent] = []

    def take(self) -> tuple[KvEvent, ...]:
        """Changes since the last call, numbered on without a gap."""
        self._end_stored()
        self._end_removed()
        events, self._events = tuple(self._events), []
        return events

    def listing(self, tier: Tier) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """(hashes, parent of each) of everything that can be hit in a tier now, parents first."""
        held = self._held[tier]
        return tuple(held), tuple(held.values())

    def snapshot(self, worker_id: WorkerId, epoch: int) -> KvSnapshot:
        """All of it, for one who missed events."""
        hashes, parents = self.listing(Tier.DEVICE)
        return KvSnapshot(
            worker_id=worker_id,
            epoch=epoch,
            next_event_number=self.last_number + 1,
            hashes=hashes,
            parents=parents,
            host_hashes=self.listing(Tier.HOST)[0],
        )

    def store(self, tier: Tier, before: bytes, hashes: tuple[bytes, ...]) -> None:
        """A block with these hash blocks, which follow `before`, can be hit."""
        if self._removed:
            self._end_removed()
        held, again, run = self._held[tier], self._again[tier], self._stored
        if run is not None and run.last == before and run.tier is tier and held.keys().isdisjoint(hashes):  # mostly
            held.update(zip(hashes, (before, *hashes), strict=False))
            run.hashes += hashes
            run.last = hashes[-1]
            return
        for name in hashes:
            if name in held:
                again[name] = again.get(name, 0) + 1
            else:
                held[name] = before
                if run is None or run.last != before or run.tier is not tier:
                    self._end_stored()
                    run = self._stored = _Run(tier=tier, parent=before, last=before, hashes=[])
                run.hashes.append(name)
                run.last = name
            before = name

    def remove(self, tier: Tier, hashes: tuple[bytes, ...]) -> None:
        """That block cannot be hit any more."""
        if self._stored is not None:
            self._end_stored()
        if tier is not self._removed_tier:
            self._end_removed()
            self._removed_tier = tier
        held, again = self._held[tier], self._again[tier]
        for name in reversed(hashes):
            if name in again:
                again[name] -= 1
                if not again[name]:
                    del again[name]
            else:
                del held[name]
                self._removed.append(name)

    def restate(self) -> None:
        """Tell everything anew: all is cleared, then what can still be hit is stored. Changes not taken yet are part of it."""
        self._end_stored()
        self._end_removed()
        self.last_number -= len(self._events) - 1
        self._events = [AllBlocksCleared(number=self.last_number)]
        held, self._held = self._held, {tier: {} for tier in Tier}
        for tier, names in held.items():
            for name, before in names.items():
                self.store(tier, before, (name,))
            self._held[tier] = names

    def _end_stored(self) -> None:
        if self._stored is not None:
            self.last_number += 1
            run = self._stored
            self._events.append(BlocksStored(number=self.last_number, parent=run.parent, hashes=tuple(run.hashes), tier=run.tier))
            self._stored = None

    def _end_removed(self) -> None:
        if self._removed:
            self.last_number += 1
            self._events.append(BlocksRemoved(number=self.last_number, hashes=tuple(self._removed), tier=self._removed_tier))
            self._removed = []


@dataclass(slots=True, kw_only=True)
class _Run:
    tier: Tier
    parent: bytes
    last: bytes
    hashes: list[bytes]
