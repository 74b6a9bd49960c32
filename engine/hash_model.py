"""A make-believe model for executors without weights: tokens are a hash of the prefix, read back from real KV blocks.

    word_i  = word_{i-1} * K + mix(token_i)  mod 2^64             "the KV of token i": it stands for all tokens up to i
    read    = sum of word_i * K^i  mod 2^64                       of the words 0 … n as they lie in the blocks
    next    = xxh3_64(read, seed, choice, position) mod vocabulary

So tokens do not depend on batch, chunk, phase or worker, and one missing, stale or misplaced block changes them. The words read
are also compared with those the tokens call for (`num_wrong_reads`): a step on blocks that were not verified shows at once.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from engine.core.executor import BatchPlan, PlanEntry, Sampled, SampledTokens, SequenceStart
from protocol.messages import TokenLogprobs
from protocol.request import SamplingParams

WORD_BYTES = 8
_K = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_MASK = (1 << 64) - 1
_K_INVERSE = pow(_K, -1, 1 << 64)
_FEW = 24  # tokens: numpy pays from here on


class KvMemory(Protocol):
    """Blocks that hold one word a token (and whatever else a layout asks for)."""

    def write(self, block_table: array[int], start: int, words: array[int]) -> None:
        """Words of tokens [start, start + len(words)) of the sequence that lives in `block_table`."""
        ...

    def read(self, block_table: array[int], num_tokens: int) -> bytes:
        """The words of its first `num_tokens` tokens, native byte order."""
        ...

    def copy(self, source_block: int, target_block: int) -> None: ...


def prefix_words(previous: int, token_ids: array[int]) -> array[int]:
    """The words of `token_ids`, continuing after word `previous` (0 before the first token). uint64."""
    words = array("Q")
    if len(token_ids) < _FEW:
        for token_id in token_ids:
            previous = (previous * _K + _mix(token_id)) & _MASK
            words.append(previous)
        return words
    mixed = _mix_all(np.frombuffer(token_ids, dtype=np.uint32))
    up, down = _powers(len(mixed))
    before = np.uint64(previous * _K & _MASK)
    words.frombytes((up * (before + np.cumsum(mixed * down, dtype=np.uint64))).tobytes())
    return words


def read_of(words: bytes) -> int:
    """What reading these words, uint64 in native byte order, comes to: another word, or two in each other's place, change it."""
    read = np.frombuffer(words, dtype=np.uint64)
    return int((read * _powers(len(read))[0]).sum(dtype=np.uint64)) if len(read) else 0


def next_token(read: int, sampling: SamplingParams, *, choice: int, position: int, vocab_size: int, eos_period: int = 0) -> int:
    """The token at output `position` after `read_of` the context. Greedy choices are equal; seeded ones differ.

    eos_period: one position in so many, on average, is EOS; 0: never. Stop tokens do not come before `min_tokens`.
    """
    draw = b"" if sampling.temperature == 0 else (sampling.seed % (1 << 64)).to_bytes(8, "little") + choice.to_bytes(4, "little")
    value = xxhash.xxh3_64_intdigest(read.to_bytes(8, "little") + draw + position.to_bytes(4, "little"))
    may_stop = position >= sampling.min_tokens
    if eos_period and may_stop and sampling.eos_token_ids and not sampling.ignore_eos and (value >> 40) % eos_period == 0:
        return sampling.eos_token_ids[0]
    banned = sampling.eos_token_ids if may_stop else sampling.eos_token_ids + sampling.stop_token_ids
    assert vocab_size > len(banned), f"a vocabulary of {vocab_size} tokens, {len(banned)} of them banned"
    token_id = value % vocab_size
    while token_id in banned:
        token_id = (token_id + 1) % vocab_size
    return token_id


@dataclass(slots=True, kw_only=True, eq=False)
class _Known:
    start: SequenceStart
    tokens: array[int]
    words: array[int]


class HashModel:
    """What an executor remembers and computes; `run` is one forward pass, or several equal ones."""

    def __init__(self, memory: KvMemory, *, vocab_size: int, eos_period: int = 0) -> None:
        self.num_wrong_reads = 0
        self._memory = memory
        self._vocab_size = vocab_size
        self._eos_period = eos_period
        self._known: dict[int, _Known] = {}

    @property
    def num_known(self) -> int:
        return len(self._known)

    def run(self, plan: BatchPlan, num_steps: int = 1) -> Sampled:
        """Effects of the first `num_steps` steps of `plan`, in the order BatchPlan states; their samples."""
        for sequence_id in plan.ended:
            self._known.pop(sequence_id, None)  # unknown where the step that was to start it failed
        for start in plan.starts:
            assert start.sequence_id not in self._known, f"sequence {start.sequence_id} starts twice"
            self._known[start.sequence_id] = _Known(start=start, tokens=start.token_ids[:], words=array("Q"))
        for source, target in plan.block_copies:
            self._memory.copy(source, target)
        sampled = [array("I") for _ in plan.samples]
        for step in range(num_steps):
            reads = [self._forward(entry, step) for entry in plan.entries]
            for tokens, sample in zip(sampled, plan.samples, strict=True):
                known = self._known[sample.sequence_id]
                token_id = next_token(
                    reads[sample.entry_index],
                    known.start.sampling,
                    choice=known.start.choice,
                    position=len(known.tokens) - known.start.num_prompt_tokens,
                    vocab_size=self._vocab_size,
                    eos_period=self._eos_period,
                )
                known.tokens.append(token_id)
                tokens.append(token_id)
        return Sampled.of(
            SampledTokens(sequence_id=sample.sequence_id, token_ids=tokens, logprobs=self._logprobs(sample.sequence_id, tokens))
            for sample, tokens in zip(plan.samples, sampled, strict=True)
        )

    def _forward(self, entry: PlanEntry, step: int) -> int:
        """Write the words of one entry's tokens, read those of the whole context."""
        known = self._known[entry.sequence_id]
        start, end = entry.start + step, entry.start + step + entry.num_tokens
        assert end <= len(known.tokens), f"token {end - 1} of sequence {entry.sequence_id} is not known yet"
        missing = known.tokens[len(known.words) : end]
        known.words += prefix_words(known.words[-1] if known.words else 0, missing)
        self._memory.write(entry.block_table, start, known.words[start:end])
        read = self._memory.read(entry.block_table, end)
        self.num_wrong_reads += read != known.words[:end].tobytes()
        return read_of(read)

    def _logprobs(self, sequence_id: int, token_ids: array[int]) -> tuple[TokenLogprobs, ...]:
        count = self._known[sequence_id].start.sampling.num_logprobs
        if count is None:
            return ()
        return tuple(
            TokenLogprobs(
                logprob=-0.5,
                rank=1,
                top_token_ids=array("I", [(token_id + i) % self._vocab_size for i in range(count)]),
                top_logprobs=tuple(-0.5 - i for i in range(count)),
            )
            for token_id in token_ids
        )


def _mix(token_id: int) -> int:
    """Bits of a token id, spread over a word."""
    mixed = (token_id + 1) * _K_INVERSE & _MASK
    return (mixed ^ mixed >> 29) * _K & _MASK


def _mix_all(token_ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    mixed = (token_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(_K_INVERSE)
    return (mixed ^ mixed >> np.uint64(29)) * np.uint64(_K)


def _powers(count: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """K^0, K^1, ... and K^0, K^-1, ... mod 2^64."""
    up, down = _table(max(10, (count - 1).bit_length()))
    return up[:count], down[:count]


@lru_cache(maxsize=32)
def _table(bits: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    up, down = (np.full(1 << bits, base, dtype=np.uint64) for base in (_K, _K_INVERSE))
    up[0] = down[0] = 1
    return np.cumprod(up, dtype=np.uint64), np.cumprod(down, dtype=np.uint64)
