"""The four workloads on which placement policies are compared, and the paced cluster they are made for. Pure: a seed gives a workload.

    shared_prefixes   24 groups, each a prompt of 512 tokens and 4 documents of 512 behind it; 64 own tokens a request
                      all prefixes together: 1.5 times the KV capacity of the prefill pool
    fan_out           bursts of 8 siblings, at once, over 1,024 tokens nobody has seen; 64 own tokens each
    unshared          1,088 own tokens
    hot_prefix        8 of 10 requests over the same 1,024 tokens and 64 own ones; 2 of 10 share nothing

Rates: on 8 prefill workers that compute a token in 0.3 ms, a policy that finds nothing in any cache would be given 0.8 (unshared) to 1.6
times (hot_prefix) what they can do, one that finds what is there stays below. So queues of modelled workers make the first token late.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from baton.bench.load import Workload
from protocol.errors import ConfigError
from simulator.traces.content import LOWEST_TOKEN_ID

BLOCK_TOKENS = 16
NUM_WORKERS = 8  # of each pool
OUTPUT_TOKENS = 8
PREFILL_TOKEN_S = 3e-4

NUM_GROUPS = 24
HEAD_TOKENS = 512  # of a group
NUM_DOCUMENTS = 4  # of a group, one of them in a request
DOCUMENT_TOKENS = 512
WORKING_SET = 1.5  # of the prefill pool
OWN_TOKENS = 64
PREFIX_TOKENS = HEAD_TOKENS + DOCUMENT_TOKENS
PROMPT_TOKENS = PREFIX_TOKENS + OWN_TOKENS
NUM_SIBLINGS = 8
HOT_SHARE = 0.8
NUM_KV_BLOCKS = math.ceil(NUM_GROUPS * (HEAD_TOKENS + NUM_DOCUMENTS * DOCUMENT_TOKENS) / WORKING_SET / NUM_WORKERS / BLOCK_TOKENS)

Tokens = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How prompts of one workload come about. `prompts` draws them without end."""

    name: str
    rate_per_s: float  # requests a second, all siblings of a burst counted, for NUM_WORKERS prefill workers
    prompts: Callable[[Random, range], Iterator[Tokens]]
    burst_size: int = 1  # requests that arrive at the same moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic(Workload):
    """Requests of one shape: Poisson arrivals of bursts, prompts in the order of their arrival."""

    shape: Shape

    def arrivals_s(self) -> list[float]:
        rng = Random(f"arrivals {self.seed}")
        bursts = itertools.accumulate(rng.expovariate(self.request_rate / self.shape.burst_size) for _ in itertools.count())
        return list(itertools.islice((at_s for at_s in bursts for _ in range(self.shape.burst_size)), self.num_requests))

    def prompts(self) -> list[Tokens]:
        rng = Random(f"prompts {self.seed}")
        return list(itertools.islice(self.shape.prompts(rng, range(LOWEST_TOKEN_ID, self.vocab_size)), self.num_requests))


def traffic(name: str, *, seconds: float, seed: int, num_workers: int = NUM_WORKERS) -> Traffic:
    """As many requests as arrive in `seconds` on average, for a prefill pool of `num_workers`.

    Raises:
        ConfigError: no such workload.
    """
    shape = SHAPES.get(name)
    if shape is None:
        raise ConfigError(f"workload {name!r} is unknown; choose from {', '.join(SHAPES)}")
    rate = shape.rate_per_s * num_workers / NUM_WORKERS
    count = max(1, round(seconds * rate / shape.burst_size)) * shape.burst_size
    return Traffic(num_requests=count, request_rate=rate, input_len=PROMPT_TOKENS, output_len=OUTPUT_TOKENS, seed=seed, shape=shape)


def cluster_config(num_workers: int = NUM_WORKERS) -> dict[str, dict[str, object]]:
    """What `baton serve` is told: pools of paced workers, every prompt computed in one and decoded in the other.

    Prefixes are not pulled from other workers: between processes of one machine a copy costs next to nothing, and would hide where a
    request was placed.
    """
    return {
        "model": {"path": "demo"},
        "workers": {
            "executor": "paced",
            "prefill_workers": num_workers,
            "decode_workers": num_workers,
            "num_kv_blocks": NUM_KV_BLOCKS,
            "block_size": BLOCK_TOKENS,
            "seed": 0,
        },
        "paced": {"prefill_token_s": PREFILL_TOKEN_S, "decode_base_s": 0.02},
        "router": {"disaggregate": "always", "prefix_pull": False},
    }


def _draw(rng: Random, ids: range, count: int) -> Tokens:
    return rng.choices(ids, k=count)


def _shared_prefixes(rng: Random, ids: range) -> Iterator[Tokens]:
    heads = [_draw(rng, ids, HEAD_TOKENS) for _ in range(NUM_GROUPS)]
    documents = [[_draw(rng, ids, DOCUMENT_TOKENS) for _ in range(NUM_DOCUMENTS)] for _ in heads]
    while True:
        group = rng.randrange(NUM_GROUPS)
        yield heads[group] + rng.choice(documents[group]) + _draw(rng, ids, OWN_TOKENS)


def _fan_out(rng: Random, ids: range) -> Iterator[Tokens]:
    while True:
        prefix = _draw(rng, ids, PREFIX_TOKENS)
        for _ in range(NUM_SIBLINGS):
            yield prefix + _draw(rng, ids, OWN_TOKENS)


def _unshared(rng: Random, ids: range) -> Iterator[Tokens]:
    while True:
        yield _draw(rng, ids, PROMPT_TOKENS)


def _hot_prefix(rng: Random, ids: range) -> Iterator[Tokens]:
    prefix = _draw(rng, ids, PREFIX_TOKENS)
    while True:
        beginning = prefix if rng.random() < HOT_SHARE else _draw(rng, ids, PREFIX_TOKENS)
        yield beginning + _draw(rng, ids, OWN_TOKENS)


UNSHARED = "unshared"
SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="shared_prefixes", rate_per_s=32.0, prompts=_shared_prefixes),
        Shape(name="fan_out", rate_per_s=32.0, prompts=_fan_out, burst_size=NUM_SIBLINGS),
        Shape(name=UNSHARED, rate_per_s=19.0, prompts=_unshared),
        Shape(name="hot_prefix", rate_per_s=40.0, prompts=_hot_prefix),
    )
}


__all__ = ["NUM_SIBLINGS", "NUM_WORKERS", "SHAPES", "UNSHARED", "Shape", "Traffic", "cluster_config", "traffic"]
