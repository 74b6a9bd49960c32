"""From a row of logits to one token.

Contract: a row [vocab_size] float32 and a `Draw` -> token id and, if asked for, its logprobs. A token depends on its own row, its own
history and (seed, choice, output position) alone, so one definition serves both numerics. The order of operations is that of
protocol.request.SamplingParams. Logprobs are those of the raw logits, before bias, penalties and temperature, as in vLLM.

`reference.py` draws one row in torch; the native kernels draw all rows of a step in one call, told by `pack_draws`: the same tokens,
bit for bit.
"""

from __future__ import annotations

from kernels.sampling.packing import PackedDraws, pack_draws
from kernels.sampling.reference import Draw, Sampled, draw_token, inverse_temperature, is_greedy, logprobs_of, sample, weigh

__all__ = [
    "Draw",
    "PackedDraws",
    "Sampled",
    "draw_token",
    "inverse_temperature",
    "is_greedy",
    "logprobs_of",
    "pack_draws",
    "sample",
    "weigh",
]
