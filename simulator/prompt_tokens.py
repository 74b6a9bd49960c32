"""Tokens without KV: the answer to a prompt follows from the prompt alone, so that a run of a fleet need not write and read a word a token.

A retry says the same as the attempt before it, and whoever asks the same is told the same; but a block that is mapped wrongly goes
unseen. Runs with checkers take engine.hash_model.HashModel instead.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import xxhash

from engine.core.executor import BatchPlan, Sampled, SequenceStart


@dataclass(slots=True, kw_only=True, eq=False)
class _Answer:
    tokens: array[int]  # all that may be asked for
    num_said: int


class PromptTokens:
    """A token model for simulator.sim_executor.SimExecutor. No token is one that would stop the answer."""

    def __init__(self, *, vocab_size: int) -> None:
        self.num_wrong_reads = 0
        self._vocab_size = vocab_size
        self._answers: dict[int, _Answer] = {}

    def run(self, plan: BatchPlan, num_steps: int = 1) -> Sampled:
        """As HashModel.run."""
        answers = self._answers
        for sequence_id in plan.ended:
            answers.pop(sequence_id, None)
        for start in plan.starts:
            answers[start.sequence_id] = _Answer(tokens=self._answer(start), num_said=len(start.token_ids) - start.num_prompt_tokens)
        token_ids, sequence_ids = array("I"), plan.samples.sequence_ids
        for sequence_id in sequence_ids:
            answer = answers[sequence_id]
            said = answer.num_said
            answer.num_said = said + num_steps
            token_ids += answer.tokens[said : said + num_steps]
        assert len(token_ids) == num_steps * len(sequence_ids), "more tokens than were asked for"
        counts = None if num_steps == 1 else array("q", [num_steps]) * len(sequence_ids)
        return Sampled(sequence_ids=sequence_ids, token_ids=token_ids, counts=counts)

    def _answer(self, start: SequenceStart) -> array[int]:
        sampling = start.sampling
        draw = b"" if sampling.temperature == 0 else (sampling.seed % (1 << 64)).to_bytes(8, "little") + start.choice.to_bytes(4, "little")
        prompt = memoryview(start.token_ids).cast("B")[: start.num_prompt_tokens * start.token_ids.itemsize]
        seed = xxhash.xxh3_64_intdigest(draw, seed=xxhash.xxh3_64_intdigest(prompt))
        bits = (np.arange(sampling.max_tokens, dtype=np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
        tokens = ((bits ^ bits >> np.uint64(29)) * np.uint64(0xBF58476D1CE4E5B9) >> np.uint64(32)) % np.uint64(self._vocab_size)
        while (stops := np.isin(tokens, sampling.eos_token_ids + sampling.stop_token_ids)).any():
            tokens[stops] = (tokens[stops] + np.uint64(1)) % np.uint64(self._vocab_size)
        return array("I", tokens.astype(np.uint32).tobytes())
