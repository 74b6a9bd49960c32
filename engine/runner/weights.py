"""Loading: tensors mapped from safetensors files, converted only where the served dtype differs.

A mapped tensor is a view of the file's pages, so the workers of one machine share one copy of the weights.
"""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import torch

from engine.checkpoint import DTYPE_NAMES, Checkpoint
from protocol.errors import ModelUnavailable

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAP_NORESERVE = 0x4000  # linux/mman.h; Python names it from 3.13 on


class MappedWeights:
    """The tensors of a checkpoint by name, each made when it is asked for. Views keep their file mapped."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: str) -> None:
        """dtype: of the tensors given; a name of TORCH_DTYPES."""
        self._places = checkpoint.tensors
        self._dtype = dtype
        self._files: dict[Path, mmap.mmap] = {}

    def is_view(self, name: str) -> bool:
        """True where the tensor given lies in the file's pages, False where it is a converted copy."""
        place = self._places[name]
        return DTYPE_NAMES[place.dtype] == self._dtype and place.offset % TORCH_DTYPES[self._dtype].itemsize == 0

    def get(self, name: str) -> torch.Tensor | None:
        """None: the model has no such tensor."""
        return self[name] if name in self._places else None

    def __getitem__(self, name: str) -> torch.Tensor:
        """
        Raises:
            ModelUnavailable: its file went away or was cut short since `open_checkpoint` read its header.
        """
        place = self._places[name]
        file, end = self._file(place.path), place.offset + place.size_bytes
        if end > len(file):
            raise ModelUnavailable(f"{place.path} has {len(file)} bytes, {name} ends at {end}; fetch the checkpoint again")
        stored, count = TORCH_DTYPES[DTYPE_NAMES[place.dtype]], math.prod(place.shape)
        if place.offset % stored.itemsize == 0:
            tensor = torch.frombuffer(file, dtype=stored, count=count, offset=place.offset)
        else:  # a header that was not padded
            tensor = torch.frombuffer(bytearray(file[place.offset : end]), dtype=stored, count=count)
        return tensor.view(place.shape).to(TORCH_DTYPES[self._dtype])

    def let_go(self) -> None:
        """Take the pages read so far out of this process; they stay in the system's cache, and a view finds them there again."""
        for file in self._files.values():
            file.madvise(mmap.MADV_DONTNEED)

    def _file(self, path: Path) -> mmap.mmap:
        if (known := self._files.get(path)) is not None:
            return known
        try:
            with path.open("rb") as file:
                # Private and never written. Torch asks for memory it could write; without a reservation that costs nothing.
                flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
                mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise ModelUnavailable(f"{path} cannot be mapped: {error}; fetch the checkpoint again") from None
        self._files[path] = mapped
        return mapped


def load_weights(checkpoint: Checkpoint, *, dtype: str, device: str) -> dict[str, torch.Tensor]:
    """Every tensor of `checkpoint` by name, in `dtype`.

    Raises:
        ModelUnavailable: a file went away or changed since `open_checkpoint` read its header.
    """
    mapped = MappedWeights(checkpoint, dtype=dtype)
    return {name: mapped[name].to(device=device) for name in checkpoint.tensors}
