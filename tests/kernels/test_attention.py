"""Paged attention: right against a dense softmax in float64, blind to what it may not see, and bitwise one answer in reference numerics.

How: sweeps around tiles (8 queries, 32 keys) and blocks; unused slots of the pool hold NaN. Seen to fail with the tail not cleared
and with a window one token wider.
"""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import kernels.attention.reference as reference  # noqa: E402
from kernels.attention import AttentionSpan, paged_attention, plan_attention  # noqa: E402
from kernels.kv_write import kv_write  # noqa: E402

CPU = torch.device("cpu")
LENGTHS = [1, 3, 7, 8, 9, 16, 31, 32, 33, 64, 70]


class Pool:
    """One layer of blocks full of NaN, into which sequences are written at scattered places."""

    def __init__(self, *, block_size: int, num_kv_heads: int, head_dim: int, num_blocks: int = 64, dtype: Any = torch.float32) -> None:
        self.kv = torch.full((num_blocks, 2, num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
        self.block_size = block_size
        self._free = random.Random(block_size).sample(range(num_blocks), num_blocks)

    def store(self, key: Any, value: Any) -> array[int]:
        """key, value [num_tokens, num_kv_heads, head_dim] -> block table."""
        table = array("I", [self._free.pop() for _ in range(-(-len(key) // self.block_size))])
        positions = torch.arange(len(key))
        blocks = torch.tensor(list(table))[positions // self.block_size]
        kv_write(key, value, self.kv, blocks, positions % self.block_size)
        return table


def dense(q: Any, key: Any, value: Any, start: int, window: int | None, scale: float) -> Any:
    """q [num_tokens, num_heads, head_dim] at positions from `start`, over all of key and value, in float64."""
    group = q.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q.double(), key.double().repeat_interleave(group, 1)) * scale
    queries, keys = torch.arange(start, start + len(q))[:, None], torch.arange(len(key))
    visible = (keys <= queries) if window is None else (keys <= queries) & (keys > queries - window)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, -torch.inf).softmax(-1), value.double().repeat_interleave(group, 1))


def attend(q: Any, pool: Pool, spans: list[AttentionSpan], window: int | None, numerics: Any) -> Any:
    plan = plan_attention(spans, block_size=pool.block_size, window=window, numerics=numerics, device=CPU)
    return paged_attention(q, pool.kv, plan, scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize("numerics", ["reference", "fast"])
@pytest.mark.parametrize("window", [None, 1, 20, 32])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(1, 1, 8), (4, 2, 18), (6, 1, 64)])
@pytest.mark.parametrize("block_size", [16, 32, 48])
def test_attention_equals_a_dense_softmax(
    block_size: int, num_heads: int, num_kv_heads: int, head_dim: int, window: int | None, numerics: str
) -> None:
    """A batch of every length, each half prefilled: its last tokens (all, one, or some) attend over the whole."""
    pool = Pool(block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim)
    spans, queries, expected = [], [], []
    first_row = 0
    for index, length in enumerate(LENGTHS):
        key, value = torch.randn(2, length, num_kv_heads, head_dim)
        num_tokens = (length, 1, (length + 1) // 2)[index % 3]
        q = torch.randn(num_tokens, num_heads, head_dim)
        spans.append(
            AttentionSpan(first_row=first_row, start=length - num_tokens, num_tokens=num_tokens, block_table=pool.store(key, value))
        )
        queries.append(q)
        expected.append(dense(q, key, value, length - num_tokens, window, head_dim**-0.5))
        first_row += num_tokens
    padding = torch.full((3, num_heads, head_dim), float("nan"))
    out = attend(torch.cat([*queries, padding]), pool, spans, window, numerics)
    assert (out[:first_row] - torch.cat(expected)).abs().max() < 1e-5
    assert torch.equal(out[first_row:], torch.zeros(3, num_heads, head_dim)), "rows of no span are zeros"


@pytest.mark.parametrize("window", [None, 20])
def test_reference_bits_do_not_depend_on_the_schedule(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sequence of 70 tokens: at once, token by token, in chunks, in a batch, on other block sizes, in small slabs."""
    key, value = torch.randn(2, 70, 2, 18)
    q = torch.randn(70, 4, 18)
    whole = None
    for block_size in (16, 32, 48, 64):
        pool = Pool(block_size=block_size, num_kv_heads=2, head_dim=18)
        table = pool.store(key, value)
        others = [pool.store(*torch.randn(2, length, 2, 18)) for length in (5, 33)]
        for max_pairs in (128, 7):
            monkeypatch.setattr(reference, "MAX_PAIRS", max_pairs)
            for chunk in (70, 1, 3, 16, 33):
                out = torch.zeros_like(q)
                for start in range(0, 70, chunk):
                    size = min(chunk, 70 - start)
                    spans = [
                        AttentionSpan(first_row=0, start=4, num_tokens=1, block_table=others[0]),
                        AttentionSpan(first_row=1, start=start, num_tokens=size, block_table=table),
                        AttentionSpan(first_row=1 + size, start=30, num_tokens=3, block_table=others[1]),
                    ]
                    rows = torch.cat((torch.randn(1, 4, 18), q[start : start + size], torch.randn(3, 4, 18)))
                    out[start : start + size] = attend(rows, pool, spans, window, "reference")[1 : 1 + size]
                whole = out if whole is None else whole
                assert torch.equal(out, whole), (block_size, max_pairs, chunk)


def test_bfloat16_attends_in_float32() -> None:
    """The error is that of rounding the inputs and the output, not of 70 sums in bf16."""
    key, value = torch.randn(2, 70, 2, 32).bfloat16()
    q = torch.randn(70, 4, 32).bfloat16()
    pool = Pool(block_size=16, num_kv_heads=2, head_dim=32, dtype=torch.bfloat16)
    table = pool.store(key, value)
    out = attend(q[69:], pool, [AttentionSpan(first_row=0, start=69, num_tokens=1, block_table=table)], None, "fast")
    assert out.dtype == torch.bfloat16
    assert (out - dense(q[69:], key, value, 69, None, 32**-0.5)).abs().max() < 2**-8


def test_a_sequence_of_nan_does_not_touch_its_neighbours() -> None:
    for numerics in ("reference", "fast"):
        pool = Pool(block_size=16, num_kv_heads=1, head_dim=8)
        key, value = torch.randn(2, 20, 1, 8)
        bad, good = pool.store(key * float("nan"), value), pool.store(key, value)
        spans = [AttentionSpan(first_row=row, start=19, num_tokens=1, block_table=table) for row, table in enumerate((bad, good))]
        q = torch.randn(2, 1, 8)
        out = attend(q, pool, spans, None, numerics)
        assert out[0].isnan().all()
        assert (out[1] - dense(q[1:], key, value, 19, None, 8**-0.5)).abs().max() < 1e-5


def test_a_step_without_tokens_attends_to_nothing() -> None:
    pool = Pool(block_size=16, num_kv_heads=1, head_dim=8)
    for numerics in ("reference", "fast"):
        assert attend(torch.zeros(0, 2, 8), pool, [], None, numerics).shape == (0, 2, 8)
