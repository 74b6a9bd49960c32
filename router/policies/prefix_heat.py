"""How often a prefix is asked for again: whether a copy of it on one more worker would be used. And where it will soon be decoded.

    uses(prefix) = requests of late that found it cached / workers that would share them, the new one included

Only workers a prompt could go to share them: those of the decode pool hold what they were handed, and compute nothing with it.

A prompt that many send at the same moment looks as popular as one that many will send all day. So nothing counts before it was asked
for at a second moment, or a worker has said that it holds the prefix: siblings of a burst come at once, while it is being computed.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.messages import Place
from protocol.worker import BlocksStored, WorkerId
from router.policies.api import Booked, KvChanged

MAX_PREFIXES = 4096
SOON_S = 2.0  # a prompt booked so lately is on its way to its decode worker, or there
MOMENT_S = 0.03  # siblings that are sent at once follow each other sooner


@dataclass(slots=True)
class _Heat:
    count: float  # of requests, each half forgotten after `half_life_s`
    at_s: float  # when that was true
    is_lasting: bool = False  # a worker holds it, or it had a second moment
    decode_worker: WorkerId = ""  # of the last of these requests

    def now(self, now: float, half_life_s: float) -> float:
        return self.count * math.exp2((self.at_s - now) / half_life_s)


class PrefixHeat:
    """Of the MAX_PREFIXES that were asked for last. half_life_s: 0 keeps nothing, so that no copy seems of use."""

    def __init__(self, *, half_life_s: float) -> None:
        self._half_life_s = half_life_s
        self._heat: OrderedDict[bytes, _Heat] = OrderedDict()  # by the last block of the prefix, the least recent first

    def uses(self, request: Place, cached_tokens: Sequence[int], now: float) -> float:
        """Of one more copy of the longest prefix of this prompt that any worker of the pool has; cached_tokens: of each of them."""
        if not self._heat:
            return 0.0
        most = max(cached_tokens)
        heat = self._heat.get(request.block_hashes[most // HASH_BLOCK_SIZE_TOKENS - 1]) if most >= HASH_BLOCK_SIZE_TOKENS else None
        if heat is None or not heat.is_lasting:
            return 0.0
        return heat.now(now, self._half_life_s) / (cached_tokens.count(most) + 1)

    def soon_on(self, request: Place, cached_tokens: Mapping[WorkerId, int], now: float) -> tuple[WorkerId, int]:
        """The worker that decodes the last prompt over the longest prefix anybody has of this one, and how long that prefix is in tokens.

        It is handed over once, and siblings that decode there too share it. ("", 0): nobody knows.
        """
        most = max(cached_tokens.values(), default=0)
        if most < HASH_BLOCK_SIZE_TOKENS or not self._heat:
            return "", 0
        heat = self._heat.get(request.block_hashes[most // HASH_BLOCK_SIZE_TOKENS - 1])
        if heat is None or now > heat.at_s + SOON_S:
            return "", 0
        return heat.decode_worker, most

    def booked(self, event: Booked, now: float) -> None:
        """Somebody asked for what his worker has cached."""
        if event.cached_tokens < HASH_BLOCK_SIZE_TOKENS or not self._half_life_s:
            return
        name = event.request.block_hashes[event.cached_tokens // HASH_BLOCK_SIZE_TOKENS - 1]
        heat = self._heat.pop(name, None) or _Heat(0.0, now)
        heat.is_lasting |= event.confirmed_tokens == event.cached_tokens or now >= heat.at_s + MOMENT_S
        heat.count, heat.at_s, heat.decode_worker = heat.now(now, self._half_life_s) + 1.0, now, event.decode_worker
        self._heat[name] = heat
        if len(self._heat) > MAX_PREFIXES:
            self._heat.popitem(last=False)

    def changed(self, event: KvChanged) -> None:
        for stored in event.events:
            if isinstance(stored, BlocksStored) and self._heat and not self._heat.keys().isdisjoint(stored.hashes):
                self._hold(stored.hashes)

    def _hold(self, hashes: Iterable[bytes]) -> None:
        for name in self._heat.keys() & set(hashes):
            self._heat[name].is_lasting = True

    def snapshot(self) -> bytes:
        return json.dumps([[name.hex(), asdict(heat)] for name, heat in self._heat.items()]).encode()

    def restore(self, state: bytes) -> None:
        self._heat = OrderedDict((bytes.fromhex(name), _Heat(**heat)) for name, heat in json.loads(state))
