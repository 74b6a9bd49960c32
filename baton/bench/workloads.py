"""The workloads of `baton bench engine`: which requests, drawn from a seed, and which figures follow from when their tokens came.

Every engine gets the same token ids. They are drawn anew for each run, so that no prefix cache holds what an earlier run computed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from baton.bench.report import percentile
from protocol.errors import ConfigError
from protocol.timeline import Timeline
from simulator.verdict import Better

FIRST_TOKEN_ID = 3  # below it are the special tokens of Llama's vocabulary
NUM_ONLINE_REQUESTS = 24
NUM_WARM_TOKENS = 8
DEFAULT_WORKLOADS = "one_stream,batch8,batch32,batch64,prefill2k,prefill8k,shared_prefix"


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedRequest:
    """What one engine is asked for: greedy, `num_tokens` whatever they are, arriving `at_s` after the start."""

    prompt: tuple[int, ...]
    num_tokens: int
    at_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One figure of a run, from the timelines of its requests (clock 0: the start of the run)."""

    name: str  # "" where the workload has this one alone
    unit: str
    better: Better
    value: Callable[[Sequence[Timeline]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`num_requests` prompts of `num_prompt_tokens`, the first `num_shared_tokens` of which are the same in all."""

    name: str
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    measures: tuple[Measure, ...]
    num_shared_tokens: int = 0
    rate_per_s: float | None = None  # of arrivals, Poisson; None: all at once
    is_streamed: bool = False  # each token's time is needed

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def num_kv_tokens(self) -> int:
        """Tokens of all sequences together, shared ones counted for each."""
        return self.num_requests * self.max_model_len

    def requests(self, rng: Random, vocab_size: int) -> list[AskedRequest]:
        """Freshly drawn; arrivals are exponential steps."""
        shared = _tokens(rng, vocab_size, self.num_shared_tokens)
        at_s, asked = 0.0, []
        for _ in range(self.num_requests):
            prompt = shared + _tokens(rng, vocab_size, self.num_prompt_tokens - self.num_shared_tokens)
            asked.append(AskedRequest(prompt=prompt, num_tokens=self.num_output_tokens, at_s=at_s))
            at_s += rng.expovariate(self.rate_per_s) if self.rate_per_s is not None else 0.0
        return asked

    def warm_up(self, rng: Random, vocab_size: int) -> list[AskedRequest]:
        """The same shapes for a few tokens, all at once: what an engine does only once is over before it is measured."""
        requests = self.requests(rng, vocab_size)
        if self.rate_per_s is not None:
            requests = requests[:8]
        return [AskedRequest(prompt=r.prompt, num_tokens=min(r.num_tokens, NUM_WARM_TOKENS)) for r in requests]


def parse_workloads(names: str) -> tuple[Workload, ...]:
    """ "one_stream,batch32,online@2" as workloads.

    Raises:
        ConfigError: a name is unknown, or there is none.
    """
    workloads = tuple(_parse_workload(name.strip()) for name in names.split(",") if name.strip())
    if not workloads:
        raise ConfigError(f"no workload in {names!r}; choose from {KNOWN}")
    return tuple({workload.name: workload for workload in workloads}.values())


KNOWN = "one_stream, batchN, prefillNk, shared_prefix, online@RATE"


def _parse_workload(name: str) -> Workload:
    if name == "one_stream":
        return Workload(name=name, num_requests=1, num_prompt_tokens=256, num_output_tokens=64, measures=(PER_TOKEN,), is_streamed=True)
    if name == "shared_prefix":
        return Workload(
            name=name,
            num_requests=32,
            num_prompt_tokens=1152,
            num_shared_tokens=1024,
            num_output_tokens=16,
            measures=(THROUGHPUT,),
        )
    if found := re.fullmatch(r"batch([1-9]\d{0,2})", name):
        return Workload(name=name, num_requests=int(found[1]), num_prompt_tokens=256, num_output_tokens=64, measures=(THROUGHPUT,))
    if found := re.fullmatch(r"prefill([1-9]\d{0,2})k", name):
        num_tokens = 1024 * int(found[1])
        return Workload(name=name, num_requests=1, num_prompt_tokens=num_tokens, num_output_tokens=1, measures=(prefill_speed(num_tokens),))
    if (found := re.fullmatch(r"online@(\d+(?:\.\d+)?)", name)) and float(found[1]) > 0:
        return Workload(
            name=name,
            num_requests=NUM_ONLINE_REQUESTS,
            num_prompt_tokens=256,
            num_output_tokens=64,
            measures=ONLINE,
            rate_per_s=float(found[1]),
            is_streamed=True,
        )
    raise ConfigError(f"workload {name!r} is unknown; choose from {KNOWN}")


def _tokens(rng: Random, vocab_size: int, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(count))


# --- figures ----------------------------------------------------------------------------------------------------------


def output_tokens_per_s(timelines: Sequence[Timeline]) -> float:
    """From the start to the last token of all."""
    return sum(t.num_tokens for t in timelines) / max(t.token_times_s[-1] for t in timelines)


def prefill_speed(num_prompt_tokens: int) -> Measure:
    def prompt_tokens_per_s(timelines: Sequence[Timeline]) -> float:
        return num_prompt_tokens / timelines[0].token_times_s[0]

    return Measure(name="", unit="tokens/s", better=Better.HIGHER, value=prompt_tokens_per_s)


def _present(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


PER_TOKEN = Measure(
    name="", unit="ms/token", better=Better.LOWER, value=lambda ts: 1e3 * percentile(_present([t.tpot_s for t in ts]), 0.5)
)  # without the prompt's time
THROUGHPUT = Measure(name="", unit="tokens/s", better=Better.HIGHER, value=output_tokens_per_s)
ONLINE = (
    Measure(name="ttft_p50", unit="ms", better=Better.LOWER, value=lambda ts: 1e3 * percentile(_present([t.ttft_s for t in ts]), 0.5)),
    Measure(name="tpot_p50", unit="ms", better=Better.LOWER, value=lambda ts: 1e3 * percentile(_present([t.tpot_s for t in ts]), 0.5)),
    Measure(name="itl_p50", unit="ms", better=Better.LOWER, value=lambda ts: 1e3 * percentile([gap for t in ts for gap in t.itl_s], 0.5)),
    Measure(name="itl_p99", unit="ms", better=Better.LOWER, value=lambda ts: 1e3 * percentile([gap for t in ts for gap in t.itl_s], 0.99)),
)
