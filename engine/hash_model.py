"""A make-believe model for executors without weights: tokens are a hash of the prefix, read back from real KV blocks.

    word_i  = xxh3_64(word_{i-1} ‖ token_i)                       "the KV of token i": it stands for all tokens up to i
    next    = xxh3_64(word_0 … word_n as read from the blocks, seed, choice, position) mod vocabulary

So tokens do not depend on batch, chunk, phase or worker, and one missing, stale or misplaced block changes them. The words read
are also compared with those the tokens call for (`num_wrong_reads`): a step on blocks that were not verified shows at once.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Protocol

import xxhash

from engine.core.executor import BatchPlan, PlanEntry, Sampled, SampledTokens, SequenceStart
from protocol.messages import TokenLogprobs
from protocol.request import SamplingParams

WORD_BYTES = 8


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
    digest = xxhash.xxh3_64_intdigest
    for token_id in token_ids:
        previous = digest(previous.to_bytes(8, "little") + token_id.to_bytes(4, "little"))
        words.append(previous)
    return words


def next_token(words_read: bytes, sampling: SamplingParams, *, choice: int, position: int, vocab_size: int, eos_period: int = 0) -> int:
    """The token at output `position`. Greedy choices are equal; seeded ones differ.

    eos_period: one position in so many, on average, is EOS; 0: never. Stop tokens do not come before `min_tokens`.
    """
    draw = b"" if sampling.temperature == 0 else (sampling.seed % (1 << 64)).to_bytes(8, "little") + choice.to_bytes(4, "little")
    value = xxhash.xxh3_64_intdigest(words_read + draw + position.to_bytes(4, "little"))
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

    def __init__(self, memory: KvMemory | None, *, vocab_size: int, eos_period: int = 0) -> None:
        """memory: None believes every read (fleet simulations, where KV itself is not simulated)."""
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
        if self._memory is not None:
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

    def _forward(self, entry: PlanEntry, step: int) -> bytes:
        """Write the words of one entry's tokens, read those of the whole context."""
        known = self._known[entry.sequence_id]
        start, end = entry.start + step, entry.start + step + entry.num_tokens
        assert end <= len(known.tokens), f"token {end - 1} of sequence {entry.sequence_id} is not known yet"
        missing = known.tokens[len(known.words) : end]
        known.words += prefix_words(known.words[-1] if known.words else 0, missing)
        right = known.words[:end].tobytes()
        if self._memory is None:
            return right
        self._memory.write(entry.block_table, start, known.words[start:end])
        read = self._memory.read(entry.block_table, end)
        self.num_wrong_reads += read != right
        return read

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
