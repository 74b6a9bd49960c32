"""Each worker of a pool in turn: the baseline every other policy is measured against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Booked, Cost, PlacementView, PolicyCommand, PolicyEvent, Pool, WorkerLeft


class RoundRobin:
    """The worker of the pool whose turn is longest ago is next; prefill and decode keep separate turns.

    Its "seconds" are turn numbers: they order the workers and mean nothing else.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        self.config = config
        self._turn = 0
        self._prefill_turns: dict[WorkerId, int] = {}
        self._decode_turns: dict[WorkerId, int] = {}

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        turns = self._decode_turns if view.pool is Pool.DECODE else self._prefill_turns
        costs = {}
        for worker in view.workers:
            turn = float(turns.get(worker.worker_id, 0))
            costs[worker.worker_id] = Cost(turn, (("turn", turn),))
        return costs

    def observe(self, event: PolicyEvent, now: float) -> None:
        if isinstance(event, Booked):
            self._turn += 1
            self._prefill_turns[event.prefill_worker] = self._turn
            self._decode_turns[event.decode_worker] = self._turn
        elif isinstance(event, WorkerLeft):
            self._prefill_turns.pop(event.worker_id, None)
            self._decode_turns.pop(event.worker_id, None)

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        return ()

    def snapshot(self) -> bytes:
        return json.dumps([self._turn, self._prefill_turns, self._decode_turns]).encode()

    def restore(self, state: bytes) -> None:
        self._turn, self._prefill_turns, self._decode_turns = json.loads(state)
