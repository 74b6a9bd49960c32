"""Rotary frequencies of a model, stretched as its config says."""

from __future__ import annotations

import math

import torch

from engine.models.config import RopeConfig, RopeKind


class RotaryFrequencies:
    """Angles by position. Computed in float32 for the positions of a step: no table to size or to fill."""

    def __init__(self, rope: RopeConfig, head_dim: int, *, device: str) -> None:
        frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        self.scale = 1.0  # of cosines and sines
        match rope.kind:
            case RopeKind.LINEAR:
                frequencies = frequencies / rope.factor
            case RopeKind.LLAMA3:
                frequencies = _llama3(frequencies, rope)
            case RopeKind.YARN:
                frequencies = _yarn(frequencies, rope, head_dim)
                self.scale = _yarn_attention_factor(rope)
        self.frequencies = frequencies.to(device)  # [head_dim/2] float32

    def cos_sin(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [num_tokens] int64 -> cos, sin [num_tokens, head_dim/2] in `dtype`."""
        angles = positions.to(torch.float32).unsqueeze(1) * self.frequencies
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Llama 3.1: long waves are stretched by the factor, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    trained = rope.original_max_position_embeddings
    smooth = (trained / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    long_ones = torch.where(wavelengths > trained / rope.low_freq_factor, frequencies / rope.factor, blended)
    return torch.where(wavelengths < trained / rope.high_freq_factor, frequencies, long_ones)


def _yarn(frequencies: torch.Tensor, rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """YaRN (Peng et al., 2023), sec. 3.2: interpolate dimensions that turn fewer than beta_slow times in the trained length."""
    trained = rope.original_max_position_embeddings

    def dimension(num_rotations: float) -> float:
        return head_dim * math.log(trained / (num_rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    interpolate = ramp.clamp(0, 1)
    return frequencies / rope.factor * interpolate + frequencies * (1 - interpolate)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """Scale of cos and sin, which sharpens attention over the longer context."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)
