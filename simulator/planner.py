"""How many workers of which size meet an objective at the highest rate a GPU: DistServe's placement search over simulated goodput.

    Algorithm 1   any GPU reaches any other fast: each phase takes the size of the best goodput a GPU, and as many workers as the rate asks
    Algorithm 2   only GPUs of one machine do: prefill and decode workers that share a machine are judged together, repeated as a unit

Section 4 of DistServe (OSDI'24). What is not there: pipelines, as we have none yet. What is not in its code: the n:m search, which tries
several workers of each phase in a unit; the objective met by the same request in both its parts, where the released simulator looks at the
two percentiles apart; and workers that do both phases, on as many GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from simulator.pools import Pool, Pools

MAX_RATE_PER_GPU, TOLERANCE_PER_GPU = 5.0, 0.25  # requests/s: where bisection begins, and the width at which it ends, as in DistServe's
LEAST_RATE_PER_GPU, LAST_RATE_PER_GPU = 0.04, 5120.0  # below and above, nobody looks
_ROUNDING = 1e-9

Goodput = Callable[[Pools], float]  # requests/s of the whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """What Algorithm 1 answers. `prefill_goodput_per_s`, `decode_goodput_per_s`: of one worker."""

    prefill: Pool
    decode: Pool
    prefill_goodput_per_s: float
    decode_goodput_per_s: float


def best_rate(is_met: Callable[[float], bool], num_gpus: int) -> float:
    """The highest requests/s at which `is_met` was seen to hold, by bisection of the rate a GPU; 0 where it never did.

    Beyond DistServe's driver, a rate that turns out low is found to a quarter of itself, and where every try holds the range doubles.
    """
    low, high, most = 0.0, MAX_RATE_PER_GPU, MAX_RATE_PER_GPU
    while True:
        widest = TOLERANCE_PER_GPU * most / MAX_RATE_PER_GPU
        while high - low > min(widest, max(low / 4, LEAST_RATE_PER_GPU)):
            middle = (low + high) / 2
            low, high = (middle, high) if is_met(middle * num_gpus) else (low, middle)
        if high < most or most >= LAST_RATE_PER_GPU:
            return low * num_gpus
        most *= 2
        high = most


def algorithm_1(sizes: Iterable[int], goodput: Goodput, rate_per_s: float) -> Phases | None:
    """Each phase on its own: the size of the best goodput a GPU, of equal ones the smaller, then n = ceil(R / goodput) of them.

    sizes: GPUs of a worker. goodput: is asked for one worker of one phase. None: some phase meets its objective at no size.
    """
    chosen = list(sizes)
    prefill = _best([Pools(prefill=Pool(1, size)) for size in chosen], goodput)
    decode = _best([Pools(decode=Pool(1, size)) for size in chosen], goodput)
    if prefill is None or decode is None:
        return None
    (prompts, prompts_per_s), (decodes, decodes_per_s) = prefill, decode
    return Phases(
        prefill=Pool(copies(rate_per_s, prompts_per_s), prompts.num_gpus),
        decode=Pool(copies(rate_per_s, decodes_per_s), decodes.num_gpus),
        prefill_goodput_per_s=prompts_per_s,
        decode_goodput_per_s=decodes_per_s,
    )


def algorithm_2(units: Iterable[Pools], goodput: Goodput, rate_per_s: float) -> tuple[Pools, int] | None:
    """The unit of the best goodput a GPU, of equal ones that with fewer GPUs, and how many of it the rate asks for.

    None: no unit meets the objective.
    """
    found = _best(units, goodput)
    return None if found is None else (found[0], copies(rate_per_s, found[1]))


def units_within(sizes: Sequence[int], num_gpus: int) -> Iterator[Pools]:
    """All n:m of prefill and decode workers that share `num_gpus` GPUs, not all of them perforce; the paper's are those of 1:1."""
    for prefill in _pools(sizes, num_gpus - 1):
        for decode in _pools(sizes, num_gpus - prefill.num_gpus):
            yield Pools(prefill=prefill, decode=decode)


def mixed_within(sizes: Sequence[int], num_gpus: int, chunks: Iterable[int | None]) -> Iterator[Pools]:
    """Workers that do both phases and take exactly `num_gpus` GPUs."""
    for how in chunks:
        for size in sizes:
            if num_gpus % size == 0:
                yield Pools(mixed=Pool(num_gpus // size, size), chunk_tokens=how)


def copies(rate_per_s: float, goodput_per_s: float) -> int:
    """Of something that serves so much; 1 at least."""
    return max(1, ceil(rate_per_s / goodput_per_s - _ROUNDING))


def _pools(sizes: Sequence[int], num_gpus: int) -> Iterator[Pool]:
    for size in sizes:
        for count in range(1, num_gpus // size + 1):
            yield Pool(count, size)


def _best(candidates: Iterable[Pools], goodput: Goodput) -> tuple[Pools, float] | None:
    best: tuple[Pools, float] | None = None
    for pools in sorted(candidates, key=lambda pools: pools.num_gpus):
        rate_per_s = goodput(pools)
        if rate_per_s > 0.0 and (best is None or rate_per_s / pools.num_gpus > best[1] / best[0].num_gpus):
            best = (pools, rate_per_s)
    return best
