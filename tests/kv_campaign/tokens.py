"""Does the damage reach a token? The make-believe model of engine.hash_model over every byte that a decode step would read.

The paced executor reads one row of each token (it paces, it does not judge); here all rows of all valid tokens go into the hash, as
attention reads them. What lies behind the last token of a partial block is read by nobody.
"""

from __future__ import annotations

from array import array

import numpy as np

from engine.hash_model import next_token, read_of
from engine.paced import RegionMemory
from protocol.request import SamplingParams

VOCAB_SIZE = 32_000
_GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


class EveryRow(RegionMemory):
    """The paced executor's memory, read whole."""

    def read(self, block_table: array[int], num_tokens: int) -> bytes:
        parts = []
        for index, block_id in enumerate(block_table):
            end = min(self._size, num_tokens - index * self._size)
            if end == self._size:
                parts.append(self._words[block_id].tobytes())
            else:
                parts += [np.ascontiguousarray(group[block_id, :, :end]).tobytes() for group in self._groups]
        return b"".join(parts)


def first_decoded_token(words: bytes) -> int:
    """What a greedy decode step answers to the KV it read."""
    return next_token(read_of(words), _GREEDY, choice=0, position=1, vocab_size=VOCAB_SIZE)
