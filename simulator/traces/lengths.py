"""Chats that share nothing, of ShareGPT's lengths: by its deciles, or log-normal with its moments. No data set is shipped.

Summed up were the lengths of 300 requests that DistServe's repository publishes with its alignment (LLMServe/DistServe,
simdistserve/benchmarks/alignment, opt-13b at 3 requests/s; no pair of prompt and answer is above 2,048 tokens). The mean prompt has
780 tokens with a deviation of 518, the mean answer 176 with 211.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from simulator.traces.trace import Run

CONTEXT_TOKENS = 2048  # of OPT: a longer pair of prompt and answer is drawn again


@dataclass(frozen=True, slots=True)
class Deciles:
    """Even between neighbours. `tokens`: the smallest, nine deciles, the largest."""

    tokens: tuple[int, ...]

    def draw(self, rng: Random) -> float:
        place = rng.random() * (len(self.tokens) - 1)
        below = int(place)
        low, high = self.tokens[below : below + 2]
        return low + (high - low) * (place - below)


@dataclass(frozen=True, slots=True)
class LogNormal:
    mean: float  # tokens
    deviation: float

    def draw(self, rng: Random) -> float:
        return lognormal(rng, self.mean, self.deviation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A generator of prompts; pairs above `most_tokens` are drawn again."""

    prompt: Deciles | LogNormal
    output: Deciles | LogNormal
    most_tokens: int = CONTEXT_TOKENS

    def prompts(self, rng: Random, num_requests: int) -> Iterator[tuple[tuple[Run, ...], int]]:
        """Without end."""
        for number in itertools.count():
            num_prompt_tokens, num_output_tokens = self._pair(rng)
            yield (Run(f"own {number}", num_prompt_tokens),), num_output_tokens

    def _pair(self, rng: Random) -> tuple[int, int]:
        while True:
            prompt, output = (max(1, round(of.draw(rng))) for of in (self.prompt, self.output))
            if prompt + output <= self.most_tokens:
                return prompt, output


def lognormal(rng: Random, mean: float, deviation: float) -> float:
    """Of this mean and standard deviation; 1 at least."""
    variance = math.log1p((deviation / mean) ** 2)
    return max(1.0, rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance)))


SHAREGPT = Lengths(
    prompt=Deciles((9, 94, 279, 430, 573, 758, 867, 1047, 1319, 1512, 2003)),
    output=Deciles((2, 9, 14, 23, 36, 67, 164, 236, 337, 478, 1085)),
)
SHAREGPT_LOGNORMAL = Lengths(prompt=LogNormal(780, 518), output=LogNormal(176, 211))
