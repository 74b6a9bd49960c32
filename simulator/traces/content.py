"""What stands in a prompt: token ids and block hashes of its runs. A run's tokens follow from its name alone, so blocks of any size can be
cut from a trace of any other, and no two names share a token but by chance.

Hashes are made without tokens, for simulations that place and do not compute: of each block the runs that lie in it. Two prompts have
equal hashes up to the block in which they part, as they would have with tokens.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import xxhash

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from simulator.traces.trace import Run

LOWEST_TOKEN_ID = 10  # below it checkpoints tend to keep their special tokens
MAX_KEPT_TOKENS = 1 << 22  # of runs that were drawn before


class Contents:
    """Draws tokens; keeps the runs asked for last, MAX_KEPT_TOKENS of them."""

    def __init__(self, *, vocab_size: int, seed: int = 0) -> None:
        """
        Raises:
            ValueError: a vocabulary without ordinary tokens.
        """
        if vocab_size <= LOWEST_TOKEN_ID:
            raise ValueError(f"a vocabulary of {vocab_size} has no tokens from {LOWEST_TOKEN_ID} on")
        self._num_ids = vocab_size - LOWEST_TOKEN_ID
        self._seed = seed
        self._kept: OrderedDict[str, array[int]] = OrderedDict()
        self._num_kept = 0

    def tokens(self, runs: Sequence[Run]) -> array[int]:
        """Token ids of a prompt, uint32."""
        prompt = array("I")
        for run in runs:
            prompt += self._of(run)[: run.num_tokens]
        return prompt

    def _of(self, run: Run) -> array[int]:
        kept = self._kept.pop(run.name, None)
        if kept is None or len(kept) < run.num_tokens:
            self._num_kept -= len(kept) if kept is not None else 0
            kept = self._draw(f"{self._seed} {run.name}", run.num_tokens)
            self._num_kept += len(kept)
        self._kept[run.name] = kept
        while self._num_kept > MAX_KEPT_TOKENS and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._num_kept -= len(dropped)
        return kept

    def _draw(self, name: str, count: int) -> array[int]:
        """`count` ids by SplitMix64 (Steele et al., OOPSLA'14) from the hash of the name; a longer draw begins with them."""
        state = (np.arange(count, dtype=np.uint64) + np.uint64(xxhash.xxh3_64_intdigest(name.encode()))) * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ state >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ state >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        ids = (state >> np.uint64(32)) % np.uint64(self._num_ids) + np.uint64(LOWEST_TOKEN_ID)
        return array("I", ids.astype(np.uint32).tobytes())


def hashes_of(root: bytes, runs: Sequence[Run]) -> list[bytes]:
    """Names of the full blocks of HASH_BLOCK_SIZE_TOKENS tokens, a chain from `root`."""
    digest, size = xxhash.xxh3_128_digest, HASH_BLOCK_SIZE_TOKENS
    hashes: list[bytes] = []
    parent, pending, room = root, [], size  # pieces of the block that is not full yet
    for run in runs:
        name, start = run.name.encode(), 0
        while run.num_tokens - start >= room:
            pending.append(b"%d %d %b" % (start, room, name))
            parent = digest(parent + b"\0".join(pending))
            hashes.append(parent)
            start, pending, room = start + room, [], size
        if start < run.num_tokens:
            pending.append(b"%d %d %b" % (start, run.num_tokens - start, name))
            room -= run.num_tokens - start
    return hashes
