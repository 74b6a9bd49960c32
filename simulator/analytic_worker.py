"""What the analytic workers of the fast simulation have in common: a request on its way, what was done, and the run they are in.

    prefill   prefill_server.py   a prompt is a few events: the steps that a long one fills alone are one
    decode    decode_server.py    an answer is one or two: a clock of steps whose speed changes when a sequence joins or ends

What the token-accurate workers do and these do not: docs/simulation.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from protocol.worker import WorkerId
from simulator.analytic_pace import Pace
from simulator.prompt_tree import Prompt
from simulator.routed_gateway import Served
from simulator.segment_cache import Piece, SegmentCache

if TYPE_CHECKING:
    from simulator.decode_server import DecodeServer
    from simulator.prefill_server import PrefillServer


class Flight:
    """One request from its booking to its end."""

    __slots__ = (
        "booked_kv_tokens",
        "booked_pairs",
        "booked_s",
        "booked_tokens",
        "cached_tokens",
        "confirmed_tokens",
        "decode",
        "end_step",
        "lands_s",
        "num_named",
        "num_reserved",
        "predicted_output_tokens",
        "prefill",
        "prompt",
        "pulled_blocks",
        "ready_s",
        "remaining",
        "served",
    )

    def __init__(self, prompt: Prompt, served: Served) -> None:
        self.prompt = prompt
        self.served = served
        self.prefill: PrefillServer | DecodeServer
        self.decode: DecodeServer
        self.ready_s = 0.0  # at the worker that computes it
        self.booked_s = 0.0
        self.booked_tokens = 0  # of the prompt that its worker was believed to lack
        self.booked_pairs = 0
        self.booked_kv_tokens = 0
        self.predicted_output_tokens = 0
        self.lands_s = 0.0  # when its prompt was expected to be computed
        self.pulled_blocks = 0  # leading blocks that come from another worker
        self.remaining = 0  # tokens of the prompt not computed yet
        self.cached_tokens = 0
        self.num_reserved = 0
        self.num_named = 0  # leading blocks of the prompt that can be found where it is computed
        self.end_step = 0  # of the clock of its decode worker


class Tally:
    """What a worker has done, for the router to learn its pace from; grows."""

    __slots__ = ("busy_s", "decode_kv_token_steps", "decode_tokens", "num_steps", "prefill_tokens")

    def __init__(self) -> None:
        self.num_steps = 0.0
        self.prefill_tokens = 0
        self.decode_tokens = 0.0
        self.decode_kv_token_steps = 0.0
        self.busy_s = 0.0


class Driver:
    """What workers need of the run they are in."""

    __slots__ = ("cache_changed", "call_at", "decoded", "prefilled", "room_at")

    def __init__(self) -> None:
        self.call_at: Callable[[float, Callable[[float], None]], None]
        self.prefilled: Callable[[Flight, float], None]  # its prompt is computed
        self.decoded: Callable[[Flight, float], None]  # its last token is out
        self.cache_changed: Callable[[WorkerId, list[Piece], list[Piece], float], None]  # (who, stored, evicted, when); or room alone
        self.room_at: Callable[[float], None]  # from then on fewer tokens than the inbox holds wait somewhere


class PromptServer:
    """What both kinds of worker do with a prompt they compute: its room, what is found of it, and what can be found afterwards."""

    __slots__ = ("_chunk_tokens", "_driver", "_max_num_seqs", "_pace", "block_tokens", "cache", "tally", "worker_id")

    def __init__(
        self, worker_id: WorkerId, *, driver: Driver, pace: Pace, num_blocks: int, block_tokens: int, chunk_tokens: int, max_num_seqs: int
    ) -> None:
        """chunk_tokens: most of one step."""
        self.worker_id = worker_id
        self.block_tokens = block_tokens
        self.cache = SegmentCache(num_blocks)
        self.tally = Tally()
        self._driver = driver
        self._pace = pace
        self._chunk_tokens = chunk_tokens
        self._max_num_seqs = max_num_seqs

    def _take(self, flight: Flight, now: float, *, is_busy: bool) -> bool:
        """Room for the prompt, with what the cache has of it. False: there is none; one alone is always taken."""
        cache, segments, num_tokens = self.cache, flight.prompt.segments, flight.prompt.num_tokens
        num_blocks = -(-num_tokens // self.block_tokens)
        found = max(cache.match(segments), flight.pulled_blocks)
        if is_busy and num_blocks - found > cache.num_blocks - cache.num_reserved - cache.num_pinned:
            return False
        cache.pin(segments)
        stored, evicted = cache.store(segments, flight.pulled_blocks) if flight.pulled_blocks else ([], [])
        flight.cached_tokens = min(found * self.block_tokens, num_tokens - 1)
        flight.remaining = num_tokens - flight.cached_tokens
        flight.num_named, flight.num_reserved = found, num_blocks - found
        evicted += cache.reserve(flight.num_reserved)
        self._driver.cache_changed(self.worker_id, stored, evicted, now)
        return True

    def _keep(self, flight: Flight, num_tokens: int, now: float) -> bool:
        """So many tokens more are computed, and can be found from now on, also by a prompt that begins in the next step. True: all are."""
        cache, prompt = self.cache, flight.prompt
        flight.remaining -= num_tokens
        num_blocks = (prompt.num_tokens - flight.remaining) // self.block_tokens
        num_new = num_blocks - flight.num_named
        if num_new > 0:
            flight.num_named, flight.num_reserved = num_blocks, flight.num_reserved - num_new
            cache.release(num_new)
        stored, evicted = cache.store(prompt.segments, num_blocks)
        if stored or evicted:
            self._driver.cache_changed(self.worker_id, stored, evicted, now)
        if flight.remaining:
            return False
        cache.release(flight.num_reserved)
        cache.unpin(prompt.segments)
        return True
