"""Draws as the native kernels read them: BatonDraw of kernels/native/src/baton_native.h. Torch-free but for the reference it serves."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kernels.sampling.reference import Draw, inverse_temperature

_RECORD = struct.Struct("@qQIidffddfiiPPPPqq")
_SEED_MASK = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedDraws:
    """Good for one call, while the draws' token_ids do not grow."""

    records: bytes
    keeps: list[array[int] | array[float]]  # what the records point to


def pack_draws(rows: Sequence[int], draws: Sequence[Draw]) -> PackedDraws:
    """`draws[i]` is of row `rows[i]`."""
    records: list[bytes] = []
    keeps: list[array[int] | array[float]] = []

    def address(values: array[int] | array[float]) -> int:
        keeps.append(values)
        return values.buffer_info()[0]

    for row, draw in zip(rows, draws, strict=True):
        params = draw.params
        masked, bias = draw.masked, params.logit_bias
        record = _RECORD.pack(
            row,
            params.seed & _SEED_MASK,
            draw.choice,
            max(params.top_k, 0),
            params.top_p,
            _rounded_up(params.min_p) if params.min_p > 0.0 else 0.0,
            inverse_temperature(params.temperature),
            params.frequency_penalty,
            params.presence_penalty,
            params.repetition_penalty,
            len(masked),
            len(bias),
            address(array("I", masked)) if masked else 0,
            address(array("I", [token for token, _ in bias])) if bias else 0,
            address(array("f", [value for _, value in bias])) if bias else 0,
            draw.token_ids.buffer_info()[0],
            len(draw.token_ids),
            draw.num_prompt_tokens,
        )
        records.append(record)
    return PackedDraws(records=b"".join(records), keeps=keeps)


def _rounded_up(value: float) -> float:
    """The least float32 that is not below `value`: weights are float32, so both bounds let the same ones pass."""
    near = np.float32(value)
    return float(near if float(near) >= value else np.nextafter(near, np.float32(np.inf)))
