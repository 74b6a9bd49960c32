"""Loading: tensors mapped from safetensors files, converted only where the served dtype differs.

A mapped tensor is a view of the file's pages, so the workers of one machine share one copy of the weights.
"""

from __future__ import annotations

import math

import torch
from safetensors import safe_open

from engine.checkpoint import Checkpoint
from protocol.errors import ModelUnavailable

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_weights(checkpoint: Checkpoint, *, dtype: str, device: str) -> dict[str, torch.Tensor]:
    """Every tensor of `checkpoint` by name, in `dtype`.

    Raises:
        ModelUnavailable: a file went away or changed since `open_checkpoint` read its header.
    """
    names_by_path: dict[str, list[str]] = {}
    for name, place in checkpoint.tensors.items():
        names_by_path.setdefault(str(place.path), []).append(name)
    weights: dict[str, torch.Tensor] = {}
    for path, names in names_by_path.items():
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in names:
                    place = checkpoint.tensors[name]
                    stored = file.get_tensor(place.stored_as).view(-1)[place.first : place.first + math.prod(place.shape)]
                    weights[name] = stored.view(place.shape).to(device=device, dtype=TORCH_DTYPES[dtype])
        except OSError as error:
            raise ModelUnavailable(f"{path} cannot be mapped: {error}; fetch the checkpoint again") from None
    return weights
