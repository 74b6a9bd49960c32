"""Any backend, with faults drawn from a seeded generator: what a bad network, a bad kernel or a bad day would do to a transfer.

Faults come between the backend and whoever polls it: transfers start late; after the real copy bytes of the target blocks are
damaged, outcomes are late, lost, out of order or told twice. The promise of one outcome a transfer still holds for a lost one (it
ends at its deadline, as a network's would), and is broken on purpose by `duplicate`: whoever polls must not take an outcome twice.
"""

from __future__ import annotations

import itertools
import os
import select
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

import numpy as np

from kvtransfer.transport import KVTransport, Region, Ticket, Transfer
from protocol.kv import Endpoint, Outcome, TransferError


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRates:
    """Probability of each fault, a transfer. Damage (the first three) happens to delivered transfers and is silent."""

    corrupt: float = 0.0  # one bit of one target block flips
    truncate: float = 0.0  # the rest of the target blocks, from some block on, is as if never written
    misplace: float = 0.0  # two target blocks are exchanged
    cut: float = 0.0  # half-way an error: TRUNCATED
    drop: float = 0.0  # nothing arrives: DEADLINE, at the deadline
    kill: float = 0.0  # `on_kill` is called (to kill the source, say), before the transfer starts
    duplicate: float = 0.0  # the outcome is told twice
    delay: float = 0.0  # the outcome is late, and so may come after later ones
    delay_s_max: float = 0.05
    stall: float = 0.0  # the transfer starts late; its deadline stays where it was
    stall_s_min: float = 0.0
    stall_s_max: float = 0.05


class FaultyTransport:
    """`KVTransport` around another; `injected` counts what was done, by fault. `rates` may be set anew at any time."""

    def __init__(
        self, inner: KVTransport, rates: FaultRates, rng: Random, *, on_kill: Callable[[Transfer], None] = lambda transfer: None
    ) -> None:
        self.name = inner.name
        self.injected: Counter[str] = Counter()
        self._inner = inner
        self.rates = rates
        self._rng = rng
        self._on_kill = on_kill
        self._regions: dict[int, Region] = {}
        self._tickets = itertools.count(1)
        self._transfers: dict[Ticket, tuple[Transfer, float]] = {}  # with the time of the start
        self._stalled: dict[Ticket, float] = {}  # not begun before that time
        self._begun: dict[Ticket, Ticket] = {}  # the backend's ticket to ours
        self._cancelled: set[Ticket] = set()
        self._due: list[tuple[float, Ticket, Outcome]] = []  # outcomes held back until a time
        self._timers: set[threading.Timer] = set()
        self._own_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._either = select.epoll()  # readable when the backend's descriptor or ours is
        self._either.register(self._own_fd, select.EPOLLIN)
        if inner.wakeup_fd() >= 0:
            self._either.register(inner.wakeup_fd(), select.EPOLLIN)

    def register(self, region: Region) -> None:
        self._regions[region.region_id] = region
        self._inner.register(region)

    def forget(self, region_id: int) -> None:
        del self._regions[region_id]
        self._inner.forget(region_id)

    def endpoint(self) -> Endpoint:
        return self._inner.endpoint()

    def start(self, transfer: Transfer) -> Ticket:
        if self._drawn("kill"):
            self._on_kill(transfer)
        ticket = next(self._tickets)
        now = time.monotonic()
        self._transfers[ticket] = (transfer, now)
        if self.rates.stall and self._drawn("stall"):
            stall_s = min(self._rng.uniform(self.rates.stall_s_min, self.rates.stall_s_max), transfer.deadline_s)
            self._stalled[ticket] = now + stall_s
            self._wake_at(stall_s)
        else:
            self._begin(ticket)
        return ticket

    def poll(self) -> list[tuple[Ticket, Outcome]]:
        if self._own_fd >= 0 and select.select([self._own_fd], [], [], 0)[0]:
            os.eventfd_read(self._own_fd)
        now = time.monotonic()
        for ticket in [ticket for ticket, due in self._stalled.items() if due <= now]:
            del self._stalled[ticket]
            self._begin(ticket)
        for begun, outcome in self._inner.poll():
            self._hold(self._begun.pop(begun), outcome, now)
        ready = [entry for entry in self._due if entry[0] <= now or entry[1] in self._cancelled]
        self._due = [entry for entry in self._due if entry not in ready]
        done: list[tuple[Ticket, Outcome]] = []
        for due, ticket, outcome in ready:
            if due > now:  # cancelled while it was held back
                outcome = replace(outcome, num_blocks=0, size_bytes=0, error=TransferError.CANCELLED, detail="cancelled")
            self._transfers.pop(ticket)
            self._cancelled.discard(ticket)
            done += [(ticket, outcome)] * (2 if self._drawn("duplicate") else 1)
        return done

    def cancel(self, ticket: Ticket) -> None:
        if ticket in self._transfers:
            self._cancelled.add(ticket)
            for begun in [begun for begun, ours in self._begun.items() if ours == ticket]:
                self._inner.cancel(begun)
            self._end_stalled(ticket)
            os.eventfd_write(self._own_fd, 1)

    def wakeup_fd(self) -> int:
        return self._either.fileno() if not self._either.closed else -1

    def close(self) -> None:
        for timer in self._timers:
            timer.cancel()
        for timer in self._timers:
            timer.join()
        self._inner.close()
        for ticket in list(self._stalled):
            self._end_stalled(ticket)
        self._cancelled |= {ticket for _, ticket, _ in self._due}
        if self._own_fd >= 0:
            self._either.close()
            os.close(self._own_fd)
            self._own_fd = -1

    def _begin(self, ticket: Ticket) -> None:
        transfer, started = self._transfers[ticket]
        left_s = max(0.0, started + transfer.deadline_s - time.monotonic())
        self._begun[self._inner.start(replace(transfer, deadline_s=left_s))] = ticket
        if self._inner.wakeup_fd() < 0:
            os.eventfd_write(self._own_fd, 1)

    def _end_stalled(self, ticket: Ticket) -> None:
        """A transfer that is cancelled before it has begun: nothing was or will be written."""
        if self._stalled.pop(ticket, None) is not None:
            error = TransferError.CANCELLED
            outcome = Outcome(num_blocks=0, size_bytes=0, duration_s=0.0, path=self.name, error=error, detail="cancelled")
            self._due.append((time.monotonic(), ticket, outcome))

    def _hold(self, ticket: Ticket, outcome: Outcome, now: float) -> None:
        """Do what the dice say to one outcome, and decide when it is told."""
        transfer, started = self._transfers[ticket]
        due = now
        if outcome.error is None:
            self._damage(transfer)
        if outcome.error is None and self._drawn("cut"):
            outcome = replace(outcome, num_blocks=0, size_bytes=0, error=TransferError.TRUNCATED, detail="cut off by a fault")
        if outcome.error is None and self._drawn("drop"):
            outcome = replace(outcome, num_blocks=0, size_bytes=0, error=TransferError.DEADLINE, detail="dropped by a fault")
            due = max(now, started + transfer.deadline_s)
        elif self._drawn("delay"):
            due = now + self._rng.uniform(0, self.rates.delay_s_max)
        self._due.append((due, ticket, outcome))
        if due > now:
            self._wake_at(due - now)

    def _damage(self, transfer: Transfer) -> None:
        region = self._regions[transfer.target_region_id]
        size, ids, rng = region.layout.block_bytes, transfer.target_block_ids, self._rng
        if len(ids) and self._drawn("corrupt"):
            at = ids[rng.randrange(len(ids))] * size + rng.randrange(size)
            _put(region, at, bytes([_get(region, at, 1)[0] ^ 1 << rng.randrange(8)]))
        if len(ids) and self._drawn("truncate"):
            for block_id in ids[rng.randrange(len(ids)) :]:
                _put(region, block_id * size, bytes(size))
        if len(ids) > 1 and self._drawn("misplace"):
            a, b = (i * size for i in rng.sample(list(ids), 2))
            first, second = _get(region, a, size), _get(region, b, size)
            _put(region, a, second)
            _put(region, b, first)

    def _drawn(self, fault: str) -> bool:
        happens = self._rng.random() < getattr(self.rates, fault)
        self.injected[fault] += happens
        return bool(happens)

    def _wake_at(self, delay_s: float) -> None:
        self._timers = {t for t in self._timers if t.is_alive()}
        timer = threading.Timer(delay_s + 0.001, os.eventfd_write, (self._own_fd, 1))
        timer.daemon = True
        self._timers.add(timer)
        timer.start()


def _get(region: Region, start: int, size: int) -> bytes:
    if region.device is None:
        return bytes(region.blocks[start : start + size])
    (view,) = map(bytes, region.device.read(np.array([[start, size]], dtype=np.int64)))
    return view


def _put(region: Region, start: int, content: bytes) -> None:
    if region.device is None:
        region.blocks[start : start + len(content)] = content
    else:
        region.device.write(start, content)
