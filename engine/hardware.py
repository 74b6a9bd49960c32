"""What one GPU can do by its datasheet, for step times and pools of clusters that are not there. Torch-free.

Sources: NVIDIA's datasheets of A100 (June 2021), H100, H200 and L40S: dense bf16 (half of what is printed for sparse matrices), bandwidth
of the memory, one direction of the link between two GPUs of a machine. Memory is what `nvidia-smi` shows, in MiB.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from protocol.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """Peaks; what of them is reached says engine/roofline.py."""

    name: str
    bf16_flops_per_s: float  # dense
    bytes_per_s: float  # of its memory
    memory_bytes: int
    link_bytes_per_s: float  # to another GPU of the machine, in one direction


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(  # SXM4, 80 GB; NVLink 3
            name="A100", bf16_flops_per_s=312e12, bytes_per_s=2.039e12, memory_bytes=81_920 * MIB, link_bytes_per_s=300e9
        ),
        Gpu(  # SXM5, 80 GB; NVLink 4
            name="H100", bf16_flops_per_s=989.5e12, bytes_per_s=3.35e12, memory_bytes=81_559 * MIB, link_bytes_per_s=450e9
        ),
        Gpu(  # SXM5, 141 GB; NVLink 4
            name="H200", bf16_flops_per_s=989.5e12, bytes_per_s=4.8e12, memory_bytes=143_771 * MIB, link_bytes_per_s=450e9
        ),
        Gpu(  # 48 GB; PCIe 4 x16, no NVLink
            name="L40S", bf16_flops_per_s=362.05e12, bytes_per_s=0.864e12, memory_bytes=46_068 * MIB, link_bytes_per_s=32e9
        ),
    )
}


def find_gpu(name: str) -> Gpu:
    """
    Raises:
        ConfigError: there is no such GPU here; the text names the nearest.
    """
    gpu = GPUS.get(name.upper())
    if gpu is None:
        raise ConfigError(f"gpu is {name!r}, which is not known{nearest(name.upper(), GPUS)}; known: {', '.join(GPUS)}")
    return gpu


def nearest(name: str, known: Iterable[str]) -> str:
    """The part of an error text that names the most similar of `known`; empty where none is."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
