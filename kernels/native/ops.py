"""Single operations of the library on one instruction path: what the tests compare with the references."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.native.library import NativeLibrary, load_library
from kernels.native.network import pointers_to
from kernels.sampling import Draw, inverse_temperature, pack_draws


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeOps:
    """`dtype` is that of weights, KV and what a linear reads; sums, norms and scores are float32. Contracts as in kernels/*/__init__.py."""

    path: str
    dtype: torch.dtype = torch.float32

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, num_threads: int = 1) -> torch.Tensor:
        """x, weight in `dtype`, bias float32 -> float32."""
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty((x.shape[0], weight.shape[0]))
        bias_at = None if bias is None else bias.contiguous().data_ptr()
        self._call("linear", self._is_bf16, num_threads, x.data_ptr(), *x.shape, weight.data_ptr(), weight.shape[0], bias_at, y.data_ptr())
        return y

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x, weight float32 -> `dtype`; an odd bfloat16 row is padded in memory, not in what is returned."""
        num_rows, size = x.shape
        y = torch.zeros((num_rows, size + size % 2 * self._is_bf16), dtype=self.dtype)
        self._call("rms_norm", self._is_bf16, x.contiguous().data_ptr(), weight.data_ptr(), num_rows, size, eps, y.data_ptr())
        return y[:, :size]

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """gate, up float32 -> `dtype`."""
        y = torch.empty(gate.shape, dtype=self.dtype)
        self._call("silu_mul", self._is_bf16, gate.data_ptr(), up.data_ptr(), gate.numel(), y.data_ptr())
        return y

    def rotary(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        slots: torch.Tensor,
        kv: torch.Tensor,
        *,
        num_heads: int,
        q_norm: torch.Tensor | None = None,
        k_norm: torch.Tensor | None = None,
        eps: float = 1e-6,
    ) -> torch.Tensor:
        """Norm (if given) and turn q and k, write k and v into `kv` (one layer of the pool); returns q [num_rows, num_heads, head_dim].

        qkv [num_rows, (num_heads + 2 num_kv_heads) * head_dim] and cos_sin [num_rows, head_dim] float32; slots int64.
        """
        _, _, num_kv_heads, block_size, head_dim = kv.shape
        q = torch.empty((qkv.shape[0], num_heads, head_dim), dtype=self.dtype)
        norms = [None if norm is None else norm.data_ptr() for norm in (q_norm, k_norm)]
        work = qkv.clone()
        self._call(
            "rotary", self._is_bf16, work.data_ptr(), len(work), num_heads, num_kv_heads, head_dim, cos_sin.contiguous().data_ptr(),
            *norms, eps, slots.data_ptr(), block_size, q.data_ptr(), kv.data_ptr(),
        )  # fmt: skip
        return q

    def attention(
        self, q: torch.Tensor, kv: torch.Tensor, block_table: array[int], *, start: int, window: int | None, scale: float
    ) -> torch.Tensor:
        """q [num_tokens, num_heads, head_dim] at positions from `start` of one sequence; kv one layer of the pool."""
        q = q.contiguous()
        num_tokens, num_heads, head_dim = q.shape
        _, _, num_kv_heads, block_size, _ = kv.shape
        table = np.frombuffer(block_table, dtype=np.uint32)
        out = torch.empty_like(q)
        self._call(
            "attention", self._is_bf16, q.data_ptr(), num_heads, num_kv_heads, head_dim, kv.data_ptr(), block_size, table.ctypes.data,
            start, num_tokens, window or 0, scale, out.data_ptr(),
        )  # fmt: skip
        return out

    def choose_experts(self, logits: torch.Tensor, num_chosen: int, *, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """As kernels/expert_choice, but the ids are int32."""
        num_rows, num_experts = logits.shape
        experts = torch.empty((num_rows, num_chosen), dtype=torch.int32)
        weights = torch.empty((num_rows, num_chosen))
        at = experts.data_ptr(), weights.data_ptr()
        self._call("choose_experts", logits.contiguous().data_ptr(), num_rows, num_experts, num_chosen, normalize, *at)
        return experts, weights

    def experts(
        self,
        x: torch.Tensor,
        router: torch.Tensor,
        gate: Sequence[torch.Tensor],
        up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
        *,
        num_chosen: int,
        normalize: bool,
        num_threads: int = 1,
    ) -> torch.Tensor:
        """A mixture of experts: x [num_rows, hidden] and all weights in `dtype` -> [num_rows, hidden] float32."""
        x, router = x.contiguous(), router.contiguous()
        y = torch.zeros(x.shape)
        parts = [[weight.contiguous() for weight in weights] for weights in (gate, up, down)]
        self._call(
            "experts", self._is_bf16, num_threads, x.data_ptr(), *x.shape, router.data_ptr(), len(router), num_chosen, normalize,
            len(parts[0][0]), *map(pointers_to, parts), y.data_ptr(),
        )  # fmt: skip
        return y

    def greedy(self, logits: torch.Tensor) -> list[int]:
        """Index of the first of each row's greatest; -1 where a logit is not finite."""
        ids = np.empty(len(logits), dtype=np.int64)
        self._call("greedy", logits.contiguous().data_ptr(), *logits.shape, ids.ctypes.data)
        return ids.tolist()

    def weigh(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """logits [size] float32 -> weights [size] float32, as drawing has them."""
        weights = torch.empty_like(logits)
        self._call("weigh", logits.data_ptr(), len(logits), inverse_temperature(temperature), weights.data_ptr())
        return weights

    def draw(self, logits: torch.Tensor, rows: Sequence[int], draws: Sequence[Draw]) -> list[int]:
        """One token for each draw from its row of `logits` [num_rows, vocab_size] float32."""
        logits, packed = logits.contiguous(), pack_draws(rows, draws)
        ids = np.empty(len(draws), dtype=np.int64)
        self._call("draw", logits.data_ptr(), logits.shape[1], len(draws), packed.records, ids.ctypes.data)
        return ids.tolist()

    @property
    def _is_bf16(self) -> bool:
        return self.dtype == torch.bfloat16

    def _call(self, name: str, *arguments: object) -> None:
        library = load_library()
        assert isinstance(library, NativeLibrary), library
        library.check(getattr(library.calls, f"baton_{name}")(self.path.encode(), *arguments))
