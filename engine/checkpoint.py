"""Where the tensors of a Hugging Face directory lie, checked before anything is loaded. Torch-free.

Only safetensors are read: a header of JSON, then raw bytes. Pickled weights (`*.bin`, `*.pt`) can run code when loaded and are
refused. Loading itself maps the files (engine/runner/weights.py); this file reads headers and a few sampled bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

from engine.models.config import ModelConfig
from engine.models.tensors import Shape, expected_tensors, fused_tensors, is_ignorable
from kernels.numerics import Numerics
from protocol.errors import ModelError, ModelUnavailable, UnsupportedModel
from protocol.kv import ModelFingerprint

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100 * 1024 * 1024  # the limit of the safetensors library
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
SAMPLE_BYTES = 64  # read at the start, the middle and the end of each tensor for the fingerprint
NUM_NAMES_TOLD = 4  # tensor names an error lists before it says how many more


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where one tensor lies: it is, or is a part of, what a file stores under some name."""

    path: Path
    stored_as: str
    first: int  # its first element in what is stored
    dtype: str  # a key of DTYPE_NAMES
    shape: Shape
    offset: int  # of its first byte in the file
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The tensors of a directory that a ModelConfig reads, by name, in the order of a forward pass."""

    model_dir: Path
    tensors: dict[str, TensorPlace]

    @property
    def size_bytes(self) -> int:
        return sum(place.size_bytes for place in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        return sorted({place.path for place in self.tensors.values()})


def open_checkpoint(model_dir: Path, config: ModelConfig) -> Checkpoint:
    """Find every tensor `config` expects, with the shape it expects.

    Raises:
        ModelUnavailable: there are no safetensors, or a file is missing, cut short or no safetensors file.
        ModelError: tensors are missing, unexpected, or have another shape than config.json says.
        UnsupportedModel: a tensor has a dtype that is not served (quantised weights).
    """
    found: dict[str, TensorPlace] = {}
    for path in _weight_files(model_dir):
        found |= _read_header(path)
    expected = expected_tensors(config)
    _take_apart(found, config)
    if missing := [name for name in expected if name not in found]:
        raise ModelError(f"{model_dir} lacks {_some(missing)}; is config.json of the same model?")
    if extra := [name for name in sorted(found) if name not in expected and not is_ignorable(name, config)]:
        raise ModelError(f"{model_dir} has {_some(extra)}, which {config.architecture} as configured does not read")
    for name, shape in expected.items():
        _check_shape(found, name, shape)
        if found[name].dtype not in DTYPE_NAMES:
            known = ", ".join(DTYPE_NAMES)
            raise UnsupportedModel(f"{model_dir}: {name} is {found[name].dtype}; known: {known}; serve the unquantized checkpoint")
    return Checkpoint(model_dir=model_dir, tensors={name: found[name] for name in expected})


def fingerprint(checkpoint: Checkpoint, config: ModelConfig, numerics: Numerics, kernel_bits: str = "torch") -> ModelFingerprint:
    """What two workers compare before they exchange KV.

    `weights` covers name, dtype and shape of every tensor and 3 x 64 of its bytes, whichever files they are spread over, so
    a fine-tune of one shape differs; it does not prove that every byte is equal.

    kernel_bits: who computes, as far as it decides about bits (ChosenKernels.bits). Counts in reference numerics, whose tokens
    are equal only where all workers of a cluster have the same; fast numerics promise no bits and mix.
    """
    weights = hashlib.blake2b(digest_size=16)
    files = {path: path.open("rb") for path in checkpoint.files}
    try:
        for name, place in sorted(checkpoint.tensors.items()):
            weights.update(f"{name}\0{place.dtype}\0{place.shape}\0".encode())
            fd = files[place.path].fileno()
            for at in (0, max(0, place.size_bytes // 2 - SAMPLE_BYTES), max(0, place.size_bytes - SAMPLE_BYTES)):
                weights.update(os.pread(fd, min(SAMPLE_BYTES, place.size_bytes), place.offset + at))
    finally:
        for file in files.values():
            file.close()
    heads = (config.num_heads, config.num_kv_heads, config.head_dim)
    routing = None if config.experts is None else (config.experts.num_chosen, config.experts.normalize)
    shape = (config.architecture, config.rms_norm_eps, config.layer_windows, *heads, routing)
    return ModelFingerprint(
        weights=weights.hexdigest(),
        config=hashlib.blake2b(repr(shape).encode(), digest_size=16).hexdigest(),
        rope=hashlib.blake2b(repr(config.rope).encode(), digest_size=16).hexdigest(),
        dtype=config.dtype,
        quantization="",
        numerics=numerics if numerics == "fast" else f"{numerics}/{kernel_bits}",
    )


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / INDEX_NAME
    if index.exists():
        return [model_dir / name for name in _indexed_names(index)]
    if (model_dir / SINGLE_NAME).exists():
        return [model_dir / SINGLE_NAME]
    if pickled := sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in model_dir.glob(pattern)):
        raise ModelUnavailable(
            f"{model_dir} has only pickled weights ({pickled[0]}), which can run code when loaded; convert it with"
            " transformers (`AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR)` writes safetensors)"
        )
    raise ModelUnavailable(f"{model_dir} has neither {SINGLE_NAME} nor {INDEX_NAME}; fetch the checkpoint again")


def _indexed_names(index: Path) -> list[str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"{index} is not an index of safetensors ({error!r}); fetch the checkpoint again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{index} names the file {name!r}; expected safetensors in the same directory")
        if not (index.parent / name).exists():
            raise ModelUnavailable(f"{index.parent} lacks {name}, which its index names; fetch the checkpoint again")
    return names


def _read_header(path: Path) -> dict[str, TensorPlace]:
    """Tensors of one file: `[u64 header size][JSON: name -> dtype, shape, data_offsets][bytes]`."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ModelUnavailable(f"{path} of {file_bytes} bytes is no safetensors file, or cut short; fetch it again")
        raw = file.read(header_bytes)
    start = 8 + header_bytes
    places = {}
    try:
        for name, entry in json.loads(raw).items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            shape = tuple(int(size) for size in entry["shape"])
            places[name] = TensorPlace(
                path=path, stored_as=name, first=0, dtype=entry["dtype"], shape=shape, offset=start + first, size_bytes=last - first
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"{path} has a header that is not safetensors' ({error!r}); fetch it again") from None
    for name, place in places.items():
        ends_inside = start <= place.offset <= place.offset + place.size_bytes <= file_bytes
        if not ends_inside or math.prod(place.shape) * DTYPE_BYTES.get(place.dtype, 0) not in (0, place.size_bytes):
            raise ModelUnavailable(f"{path} is cut short: {name} does not lie within its {file_bytes} bytes; fetch it again")
    return places


def _take_apart(found: dict[str, TensorPlace], config: ModelConfig) -> None:
    """Put the parts of fused tensors in their stead; one that lies beside its parts stays, and is told as unexpected."""
    shapes = expected_tensors(config)
    for name, (shape, parts) in fused_tensors(config).items():
        if name not in found or any(part in found for part in parts):
            continue
        _check_shape(found, name, shape)
        whole = found.pop(name)
        num_elements, first = math.prod(shape), 0
        for part in parts:
            size = math.prod(shapes[part])
            found[part] = replace(
                whole,
                first=first,
                shape=shapes[part],
                offset=whole.offset + first * whole.size_bytes // num_elements,
                size_bytes=size * whole.size_bytes // num_elements,
            )
            first += size


def _check_shape(found: dict[str, TensorPlace], name: str, shape: Shape) -> None:
    if (place := found[name]).shape != shape:
        raise ModelError(f"{place.path.parent}: {name} has shape {list(place.shape)}; config.json says {list(shape)}")


def _some(names: list[str]) -> str:
    told = ", ".join(names[:NUM_NAMES_TOLD])
    return told if len(names) <= NUM_NAMES_TOLD else f"{told} and {len(names) - NUM_NAMES_TOLD} more tensors"
