"""Requests drawn from a seed: how they arrive, and prompts that share as published workloads do. The README's experiments need no download.

arrivals   poisson, gamma (of any burstiness), bursts of requests at one moment
prompts    Preble's five workloads (section 5 of Preble, ICLR'25), fan-out, nothing shared, chats of ShareGPT's lengths
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from protocol.errors import ConfigError
from simulator.traces.lengths import SHAREGPT, SHAREGPT_LOGNORMAL, Lengths, lognormal
from simulator.traces.trace import Run, Trace, TraceRequest

MIN_OWN_TOKENS = 1


# --- arrivals -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """Gaps of a gamma distribution between moments at which `burst_size` requests come.

    cv: standard deviation over mean of the gaps; 1 is a Poisson process, 0 a clock, production often 1 to 3.
    """

    rate_per_s: float  # requests a second, on average
    cv: float = 1.0
    burst_size: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.rate_per_s < math.inf or self.cv < 0.0 or self.burst_size < 1:
            raise ConfigError(f"{self}: a rate above 0, a cv from 0 on and bursts of 1 or more are expected")

    def moments_s(self, rng: Random) -> Iterator[float]:
        """Of each request, without end."""
        mean_s = self.burst_size / self.rate_per_s
        shape = 1.0 / self.cv**2 if self.cv else math.inf
        at_s = 0.0
        while True:
            at_s += mean_s if shape == math.inf else rng.gammavariate(shape, mean_s / shape)
            yield from itertools.repeat(at_s, self.burst_size)


# --- prompts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrompts:
    """Prompts over prefixes drawn from `num_prefixes`, equally often or by Zipf's law.

    Lengths are log-normal with these means and standard deviations, so none is below one token. `shared` is the share of a prompt that
    others have too: a head that all prompts have, and behind it the key portion of its prefix.
    """

    name: str
    prompt: tuple[float, float]  # tokens: mean, standard deviation
    output: tuple[float, float]
    shared: float
    key_portion: float  # of the shared part, what belongs to the prefix and not to all
    sharers: float  # requests on one prefix, on average
    zipf: float = 0.0  # exponent; 0: all prefixes equally often

    def prompts(self, rng: Random, num_requests: int) -> Iterator[tuple[tuple[Run, ...], int]]:
        """Without end; `num_requests` says how many prefixes there are."""
        count = max(1, round(num_requests / self.sharers))
        weights = list(itertools.accumulate(1.0 / rank**self.zipf for rank in range(1, count + 1)))
        lengths = [lognormal(rng, *self.prompt) for _ in range(count)]
        for number in itertools.count():
            prefix = rng.choices(range(count), cum_weights=weights)[0]
            num_shared = max(1, round(self.shared * lengths[prefix]))
            num_key = round(self.key_portion * num_shared)
            num_own = max(MIN_OWN_TOKENS, round((1.0 - self.shared) * lognormal(rng, *self.prompt)))
            runs = (Run("head", num_shared - num_key), Run(f"prefix {prefix}", num_key), Run(f"own {number}", num_own))
            yield tuple(run for run in runs if run.num_tokens), round(lognormal(rng, *self.output))


PREBLE = {  # table of section 5.1: prompt and output tokens (mean, standard deviation), shared part, its key portion, requests on it.
    # Its artifact draws over a given number of prefixes, all equally often and in no order; by Zipf's law in one ablation.
    w.name: w
    for w in (
        SharedPrompts(name="toolbench", prompt=(1835, 742), output=(43, 16), shared=0.85, key_portion=0.76, sharers=39),
        SharedPrompts(name="toolbench_zipf", prompt=(1835, 742), output=(43, 16), shared=0.85, key_portion=0.76, sharers=39, zipf=1.1),
        SharedPrompts(name="embodied", prompt=(2285, 471), output=(16, 13), shared=0.97, key_portion=0.76, sharers=48),
        SharedPrompts(name="programming", prompt=(3871, 1656), output=(190, 343), shared=0.97, key_portion=0.78, sharers=126),
        SharedPrompts(name="video_qa", prompt=(9865, 5976), output=(4, 1.5), shared=0.88, key_portion=0.99, sharers=8.6),
        SharedPrompts(name="loogle", prompt=(23474, 6105), output=(16, 9.9), shared=0.91, key_portion=0.94, sharers=18),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FanOut:
    """`siblings` requests, one after the other, over `prefix_tokens` nobody has seen before; `own_tokens` each."""

    siblings: int = 8
    prefix_tokens: int = 1024
    own_tokens: int = 64
    output_tokens: int = 64

    def prompts(self, rng: Random, num_requests: int) -> Iterator[tuple[tuple[Run, ...], int]]:
        for burst in itertools.count():
            for sibling in range(self.siblings):
                runs = (Run(f"burst {burst}", self.prefix_tokens), Run(f"own {burst} {sibling}", self.own_tokens))
                yield runs, self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Unshared:
    """Prompts that have nothing in common."""

    prompt: tuple[float, float] = (1020, 900)
    output: tuple[float, float] = (129, 120)

    def prompts(self, rng: Random, num_requests: int) -> Iterator[tuple[tuple[Run, ...], int]]:
        for number in itertools.count():
            yield (Run(f"own {number}", round(lognormal(rng, *self.prompt))),), round(lognormal(rng, *self.output))


GENERATORS: dict[str, SharedPrompts | FanOut | Unshared | Lengths] = {
    **PREBLE,
    "fan_out": FanOut(),
    "unshared": Unshared(),
    "sharegpt": SHAREGPT,
    "sharegpt_lognormal": SHAREGPT_LOGNORMAL,
}


def generate(name: str, arrivals: Arrivals, *, num_requests: int, seed: int, num_prefixes: int | None = None) -> Trace:
    """The same arguments are the same trace. Arrivals and prompts are drawn apart: another rate leaves prompts as they are.

    num_prefixes: that prompts are drawn over; None: as many as leave each its workload's `sharers`.

    Raises:
        ConfigError: no such generator, no requests, or a number of prefixes for prompts that are not drawn over prefixes.
    """
    source = GENERATORS.get(name)
    if source is None:
        raise ConfigError(f"there is no generator {name!r}; choose from {', '.join(GENERATORS)}")
    if num_requests < 1:
        raise ConfigError(f"{num_requests} requests are none")
    if num_prefixes is not None:
        if not isinstance(source, SharedPrompts):
            raise ConfigError(f"prompts of {name!r} are not drawn over prefixes; a number of them goes with {', '.join(PREBLE)}")
        source = replace(source, sharers=num_requests / num_prefixes)
    moments = arrivals.moments_s(Random(f"arrivals {name} {seed}"))
    prompts = source.prompts(Random(f"prompts {name} {seed}"), num_requests)
    requests = [
        TraceRequest(at_s=at_s, runs=runs, output_tokens=output_tokens)
        for at_s, (runs, output_tokens) in itertools.islice(zip(moments, prompts, strict=False), num_requests)
    ]
    return Trace(name=name, requests=tuple(requests), notes=(f"drawn from seed {seed}",))
