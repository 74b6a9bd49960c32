"""What a user asked for, and one try of it.

A request never changes; a retry is a new Attempt that carries what was already delivered. Workers compute KV over
prompt + delivered, but `num_prompt_tokens`, generator position, penalties, `min_tokens` and stop state count from the
original boundary:

    |------- prompt -------|--- delivered ---|  next token has output position len(delivered)
    0            num_prompt_tokens
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


def token_buffer(tokens: object = ()) -> array[int]:
    """A uint32 buffer, the form token ids take in every record."""
    return array("I", tokens)  # type: ignore[call-overload, no-any-return]


class FinishReason(Enum):
    STOP = "stop"  # EOS, a stop token, or a stop string (the latter cut by the gateway)
    LENGTH = "length"  # max_tokens or the context is full
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn; defaults are greedy-free OpenAI defaults (temperature 1).

    Order of operations on a float32 row of logits, as in vLLM: logit_bias, min_tokens mask, repetition / frequency /
    presence penalties, temperature, top_k, top_p, min_p, draw. temperature 0 means greedy (argmax after the penalties).
    The uniform number for (seed, choice, output position) is counter-based, so it does not depend on the batch or the attempt.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    seed: int = 0  # 64 bit; the gateway draws one where the user gave none
    n: int = 1
    num_logprobs: int | None = None  # None: no logprobs; 0: of the sampled token only; k: and of the k most likely
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency objectives of one request in seconds; None: none stated."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Everything about a request that no try of it changes."""

    request_id: str  # 32 hex digits, drawn by the gateway
    model_id: str
    prompt_token_ids: array[int]  # uint32
    sampling: SamplingParams
    cache_root: bytes  # 16 bytes, start of the prefix hash chain (protocol.block_hash.cache_root)
    arrival_s: float  # on the gateway's monotonic clock; compared only with that clock
    adapter_id: str = ""
    slo: Slo = field(default_factory=Slo)
    tenant: str = "default"
    priority: int = 0  # lower runs first
    session: str = ""  # opaque name of the conversation it belongs to; "": the client did not say

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try of a request. `number` counts from 0 and fences every message about it."""

    request: Request
    number: int
    delivered: tuple[array[int], ...]  # per choice, tokens the user already has
    finished: tuple[bool, ...]  # per choice; a finished choice is not computed again

    def __post_init__(self) -> None:
        n = self.request.sampling.n
        assert len(self.delivered) == n and len(self.finished) == n, "one entry per choice"
        assert not all(self.finished), "an attempt with nothing left to do"

    @property
    def key(self) -> AttemptKey:
        return AttemptKey(request_id=self.request.request_id, attempt=self.number)

    @property
    def live_choices(self) -> tuple[int, ...]:
        return tuple(c for c, done in enumerate(self.finished) if not done)

    def tokens(self, choice: int) -> array[int]:
        """Prompt followed by what this choice already delivered."""
        return self.request.prompt_token_ids + self.delivered[choice]


class AttemptKey(NamedTuple):
    """(request, try): the fence in front of every fact about an attempt. A tuple, since the router looks one up twenty times a decision."""

    request_id: str
    attempt: int


def first_attempt(request: Request) -> Attempt:
    n = request.sampling.n
    return Attempt(request=request, number=0, delivered=tuple(token_buffer() for _ in range(n)), finished=(False,) * n)
