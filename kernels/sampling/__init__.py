"""From one row of logits to one token.

Contract: `sample(logits, draw)` with logits [vocab_size] float32 -> token id and, if asked for, its logprobs. One row at a
time, so a token depends on its own row, its own history and (seed, choice, output position) alone: the reference serves both
numerics. The order of operations is that of protocol.request.SamplingParams. Logprobs are those of the raw logits, before bias, penalties
and temperature, as in vLLM.
"""

from __future__ import annotations

from kernels.sampling.reference import Draw, Sampled, sample, takes_most_likely

__all__ = ["Draw", "Sampled", "sample", "takes_most_likely"]
