"""How long runs of steps take, without taking them one by one: what a worker of the fast simulation asks its step-time model.

A prompt of many chunks and a batch that decodes a thousand tokens are one sum each where time is linear in what a step holds
(LinearStepTime, exactly); under any other model a prompt's chunks are summed one by one, and a batch is taken at its mean size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from engine.step_time import LinearStepTime, StepShape, StepTimeModel

Chunk = tuple[int, int]  # of a prompt: its first token, how many


class Pace:
    """Of all workers of a run. `decode_step_s(batch, kv_tokens)`: the time between two tokens of a batch that reads so much KV."""

    def __init__(self, model: StepTimeModel) -> None:
        self._model = model
        self._linear = model if isinstance(model, LinearStepTime) else None
        self.decode_step_s: Callable[[int, float], float] = self._decode_step_s
        if self._linear is not None:
            base_s, sequence_s, read_s = self._linear.decode_base_s, self._linear.decode_sequence_s, self._linear.decode_read_s
            self.decode_step_s = lambda batch, kv_tokens: base_s + batch * sequence_s + kv_tokens * read_s

    def chunks_s(self, start: int, num_chunks: int, chunk_tokens: int) -> float:
        """That many steps in a row, each with a chunk of one prompt and nothing else; the first begins at token `start`."""
        if self._linear is not None:
            pace, num_tokens = self._linear, num_chunks * chunk_tokens
            reads = num_tokens * start + num_tokens * (num_tokens + 1) // 2
            return num_chunks * pace.prefill_base_s + num_tokens * pace.prefill_token_s + reads * pace.prefill_read_s
        return sum(self.step_s([(start + i * chunk_tokens, chunk_tokens)]) for i in range(num_chunks))

    def step_s(self, chunks: Iterable[Chunk]) -> float:
        """One step with chunks of several prompts."""
        if self._linear is not None:
            pace, num_tokens, reads = self._linear, 0, 0
            for start, size in chunks:
                num_tokens += size
                reads += size * start + size * (size + 1) // 2
            return pace.prefill_base_s + num_tokens * pace.prefill_token_s + reads * pace.prefill_read_s
        shape = StepShape()
        for start, size in chunks:
            shape = shape.with_prefill(start, size)
        return self._model.step_s(shape)

    def mixed_step_s(self, chunks: Iterable[Chunk], batch: int, kv_tokens: float) -> float:
        """One step with chunks of prompts and a token of each sequence of a batch."""
        if self._linear is not None:
            chunks = list(chunks)
            return (self.step_s(chunks) if chunks else 0.0) + (self.decode_step_s(batch, kv_tokens) if batch else 0.0)
        shape = StepShape()
        for start, size in chunks:
            shape = shape.with_prefill(start, size)
        return self._model.step_s(shape.with_decodes(batch, round(kv_tokens)))

    def prompt_s(self, start: int, num_tokens: int, chunk_tokens: int) -> float:
        """The rest of a prompt alone, from token `start` on, in chunks."""
        num_chunks, rest = divmod(num_tokens, chunk_tokens)
        whole_s = self.chunks_s(start, num_chunks, chunk_tokens) if num_chunks else 0.0
        return whole_s + (self.step_s([(start + num_chunks * chunk_tokens, rest)]) if rest else 0.0)

    def _decode_step_s(self, batch: int, kv_tokens: float) -> float:
        return self._model.step_s(StepShape(decodes=batch, decode_reads=round(kv_tokens)))
