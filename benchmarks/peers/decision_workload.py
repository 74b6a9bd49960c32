"""The prompts and the ends of requests under which routers' decisions are recorded and replayed. Standard library only.

Nothing here depends on what a router decides, so a seed and the list of workers it chose are a whole recording: who replays them feeds
his own router the same prompts and tells it the recorded choice after each. Prompts are of 24 families, of conversations that grow, or
fresh; the number in flight wanders between none and 70.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

NUM_FAMILIES = 24
MAX_PREFILLING = 12
MAX_LIVE = 60
MAX_TALK_TOKENS = 2400
STEPS_AT_ONE_LEVEL = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What happens before request `number`, and its prompt."""

    number: int
    prefilled: tuple[int, ...]  # requests whose first token came
    ended: tuple[int, ...]
    tokens: tuple[int, ...]


def steps(num_requests: int, *, seed: int, block_tokens: int, alphabet: int) -> Iterator[Step]:
    """`block_tokens`: lengths are multiples of it. Tokens are 1 .. `alphabet`: of few, different prompts begin alike by chance."""
    rng = Random(seed)
    families = [_tokens(rng, 40, block_tokens, alphabet) for _ in range(NUM_FAMILIES)]
    talks: list[tuple[int, ...]] = []
    prefilling: list[int] = []
    live: list[int] = []
    level = 0
    for number in range(1, num_requests + 1):
        if number % STEPS_AT_ONE_LEVEL == 1:
            level = rng.randrange(MAX_LIVE)
        prefilled, ended = [], []
        while prefilling and (len(prefilling) > MAX_PREFILLING or rng.random() < 0.5):
            prefilled.append(prefilling.pop(rng.randrange(len(prefilling))))
        live += prefilled
        while live and (len(live) > level or rng.random() < 0.3):
            ended.append(live.pop(rng.randrange(len(live))))
        yield Step(
            number=number, prefilled=tuple(prefilled), ended=tuple(ended), tokens=_prompt(rng, families, talks, block_tokens, alphabet)
        )
        prefilling.append(number)


def _prompt(
    rng: Random, families: list[tuple[int, ...]], talks: list[tuple[int, ...]], block_tokens: int, alphabet: int
) -> tuple[int, ...]:
    kind = rng.random()
    if kind < 0.45:
        return rng.choice(families) + _tokens(rng, 30, block_tokens, alphabet)
    if kind < 0.8 and talks:
        at = rng.randrange(len(talks))
        talks[at] += _tokens(rng, 12, block_tokens, alphabet)
        return talks.pop(at) if len(talks[at]) > MAX_TALK_TOKENS else talks[at]
    talks.append(_tokens(rng, 60, block_tokens, alphabet))
    return talks[-1]


def _tokens(rng: Random, most_blocks: int, block_tokens: int, alphabet: int) -> tuple[int, ...]:
    """Up to `most_blocks` blocks of 16 tokens, or as many tokens."""
    count = block_tokens * rng.randrange(1, most_blocks * 16 // block_tokens)
    return tuple(rng.randrange(1, alphabet + 1) for _ in range(count))
