"""A decoder inside the library: weights packed once, then one call a forward pass.

The network borrows the arena of its packed weights, the pool's blocks and, as a rule, the embedding table.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from enum import IntEnum
from itertools import accumulate

import numpy as np
import torch

from kernels.native.library import NativeError, Step
from kernels.native.shape import NetworkHandle, NetworkShape
from kernels.numerics import Kernels
from kernels.sampling import Draw, pack_draws

NO_LAYER = -1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LinearPlace(IntEnum):
    """Linears of a network, as src/baton_native.h numbers them."""

    QKV = 0
    OUTPUT = 1
    GATE_UP = 2
    DOWN = 3
    HEAD = 4
    ROUTER = 5


class NormPlace(IntEnum):
    """Norms of a network, as src/baton_native.h numbers them."""

    ATTENTION = 0
    MLP = 1
    Q = 2
    K = 3
    FINAL = 4


class NativeNetwork:
    """Not thread-safe: one thread calls it.

    Made, it knows how much memory its packed weights take (`arena_bytes`). They are packed once into memory of that size (`set_arena`,
    then `set_linear` for each); or the memory was packed by a network of the same shape and path, perhaps in another process.
    """

    def __init__(self, shape: NetworkShape, *, path: Kernels, num_threads: int, frequencies: torch.Tensor, rotary_scale: float) -> None:
        """frequencies: [head_dim / 2], radians a token.

        Raises:
            NativeError: this machine has no such path, or the library cannot compute such a shape.
        """
        angles = frequencies.to(dtype=torch.float32, device="cpu").contiguous().numpy()
        self._handle = NetworkHandle(shape, path=path, num_threads=num_threads, frequencies=angles, rotary_scale=rotary_scale)
        self._network = self._handle.pointer
        self._library = self._handle.library
        self._calls = self._library.calls
        self._vocab_size = shape.vocab_size
        self._dtype = DTYPES[shape.dtype]
        self._kept: dict[str, object] = {}
        self._logits = torch.empty((1, self._vocab_size), dtype=torch.float32)
        self._rows = self._logits  # as many of them as the last step asked for
        self._step = Step()
        self._step_pointer = ctypes.byref(self._step)

    @property
    def arena_bytes(self) -> int:
        return self._handle.arena_bytes

    def set_arena(self, base: int, *, owner: object = None) -> None:
        """`base`: address of `arena_bytes` that begin a page, zeroed or packed; `owner` is kept alive as long as this network."""
        self._kept["arena"] = owner
        self._library.check(self._calls.baton_network_set_arena(self._network, base))

    def set_linear(self, layer: int, which: LinearPlace, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        """Pack `weights` ([rows, inputs] each, below each other) as one linear into the arena; they are not needed afterwards."""
        parts = [self._taken(weight) for weight in weights]
        wide = [None if bias is None else bias.detach().float().contiguous() for bias in biases]
        rows = np.array([len(part) for part in parts], dtype=np.int64)
        pointers = pointers_to(parts)
        bias_pointers = (ctypes.c_void_p * len(wide))(*(None if bias is None else bias.data_ptr() for bias in wide))
        self._library.check(
            self._calls.baton_network_set_linear(self._network, layer, which, len(parts), pointers, rows.ctypes.data, bias_pointers)
        )

    def set_experts(self, layer: int, gate: Sequence[torch.Tensor], up: Sequence[torch.Tensor], down: Sequence[torch.Tensor]) -> None:
        """Pack the experts of a layer, one weight [out, in] each in every sequence; they are not needed afterwards."""
        parts = [[self._taken(weight) for weight in weights] for weights in (gate, up, down)]
        pointers = [pointers_to(weights) for weights in parts]
        self._library.check(self._calls.baton_network_set_experts(self._network, layer, *pointers))

    def set_norm(self, layer: int, which: NormPlace, weight: torch.Tensor) -> None:
        wide = weight.detach().float().contiguous()
        self._library.check(self._calls.baton_network_set_norm(self._network, layer, which, wide.data_ptr()))

    def set_embedding(self, table: torch.Tensor) -> None:
        """Borrowed, so that a mapped table stays in the file's pages, of which a step touches one row a token; or copied into the arena,
        where the shape says so."""
        table = self._taken(table)
        self._kept["embedding"] = table
        self._library.check(self._calls.baton_network_set_embedding(self._network, table.data_ptr()))

    def set_pool(self, blocks: torch.Tensor) -> None:
        """Borrowed: [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], contiguous."""
        assert blocks.is_contiguous() and blocks.dtype == self._dtype
        self._kept["pool"] = blocks
        self._library.check(self._calls.baton_network_set_pool(self._network, blocks.data_ptr(), blocks.shape[0]))

    def set_clock(self, word: memoryview) -> None:
        """Borrowed: a uint64 that tells others which layers of a step have their KV (see `forward`)."""
        assert word.nbytes == 8 and not word.readonly
        clock = np.frombuffer(word, dtype=np.uint64)
        self._kept["clock"] = clock
        self._step.clock = clock.ctypes.data

    def forward(
        self,
        *,
        starts: array[int],
        sizes: array[int],
        token_ids: array[int],
        block_tables: tuple[array[int], ...],
        logit_entries: array[int],
        clock_begin: int = 0,
    ) -> tuple[torch.Tensor, list[int]]:
        """Compute KV of every entry: entry i computes positions [starts[i], starts[i] + sizes[i]) of its sequence.

        token_ids: of all entries in order, uint32, as are the block tables; starts, sizes and logit_entries are int64. Returns the logits
        after the last tokens of `logit_entries`, [num_logits, vocab_size] float32 and good until the next call, and of each row the index
        of the first of its greatest, -1 where a logit is not finite. The clock, where one is set, becomes clock_begin + i + 1 once KV
        of layer i is written.

        Raises:
            NativeError: an entry lies outside its blocks, a block outside the pool or a token id outside the vocabulary.
        """
        assert len(starts) == len(sizes) == len(block_tables) and len(token_ids) == sum(sizes)
        tables = array("I", b"".join(block_tables))
        table_ends = array("q", accumulate(map(len, block_tables)))
        num_logits = len(logit_entries)
        most_likely = array("q", bytes(8 * num_logits))
        logits = self._rows_for(num_logits)
        step = self._step  # columns go as their addresses: a numpy array's takes a microsecond to ask for
        step.num_entries = len(starts)
        step.starts = starts.buffer_info()[0]
        step.sizes = sizes.buffer_info()[0]
        step.token_ids = token_ids.buffer_info()[0]
        step.tables = tables.buffer_info()[0]
        step.table_ends = table_ends.buffer_info()[0]
        step.num_logits = num_logits
        step.logit_entries = logit_entries.buffer_info()[0]
        step.logits = logits.data_ptr()
        step.greedy = most_likely.buffer_info()[0]
        step.clock_begin = clock_begin
        self._library.check(self._calls.baton_network_forward(self._network, self._step_pointer))
        return logits, most_likely.tolist()

    def draw(self, logits: torch.Tensor, rows: Sequence[int], draws: Sequence[Draw]) -> list[int]:
        """One token for each draw from its row of `logits` [num_rows, vocab_size] float32."""
        packed = pack_draws(rows, draws)
        token_ids = np.empty(len(draws), dtype=np.int64)
        self._library.check(
            self._calls.baton_network_draw(self._network, logits.data_ptr(), len(draws), packed.records, token_ids.ctypes.data)
        )
        return token_ids.tolist()

    def _rows_for(self, num_logits: int) -> torch.Tensor:
        """The same memory each step: fresh memory would cost a page fault every 4 KiB."""
        if len(self._logits) < num_logits:
            self._logits = self._rows = torch.empty((num_logits, self._vocab_size), dtype=torch.float32)
        if len(self._rows) != num_logits:
            self._rows = self._logits[:num_logits]
        return self._rows

    def _taken(self, tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.dtype == self._dtype, f"{tensor.dtype} in a network of {self._dtype}"
        return tensor.detach().contiguous()


def pointers_to(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """The array of addresses that the library reads; the caller keeps the tensors alive."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


__all__ = [
    "NO_LAYER",
    "LinearPlace",
    "NativeError",
    "NativeNetwork",
    "NetworkShape",
    "NormPlace",
    "pointers_to",
]
