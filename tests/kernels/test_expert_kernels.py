"""The choice of experts, the grouped linear and the two together: right against a loop over tokens in float64, and in reference
numerics the same bits for a token whoever else chose its experts.

How: sweeps over odd sizes, row counts around one tile of 16 and four ways tokens can be spread over experts; then each row of 100 in
batches of every size. Seen to fail with the experts' segments cut one row late, with torch's linear on a whole segment (bits), with the
parts of a row put together in the order of the experts' rows, and with a softmax over the chosen experts alone.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from engine.layers.moe import Experts  # noqa: E402
from kernels.expert_choice import choose_experts  # noqa: E402
from kernels.moe_linear import moe_linear  # noqa: E402

ROW_COUNTS = [1, 2, 15, 16, 17, 33, 100]
SIZES = [(1, 1), (7, 33), (33, 7), (64, 100), (100, 16)]
NUM_EXPERTS = 5
BATCHES = [slice(first, first + num_rows) for num_rows in ROW_COUNTS for first in (0, 1, 13, 100 - num_rows) if first + num_rows <= 100]


def spread(num_rows: int, how: str) -> list[int]:
    """Rows of each of NUM_EXPERTS experts."""
    if how == "one expert has all":
        return [0, 0, 0, num_rows, 0]
    if how == "nobody chose the first and the last":
        return [0, num_rows // 3, num_rows - num_rows // 3 * 2, num_rows // 3, 0]
    if how == "one row each, the rest last":
        return [min(1, max(0, num_rows - e)) for e in range(NUM_EXPERTS - 1)] + [max(0, num_rows - NUM_EXPERTS + 1)]
    return torch.randint(NUM_EXPERTS, (num_rows,)).bincount(minlength=NUM_EXPERTS).tolist()


HOW = ["one expert has all", "nobody chose the first and the last", "one row each, the rest last", "at random"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("num_rows", [0, *ROW_COUNTS])
def test_moe_linear_is_each_row_by_its_own_weight(num_rows: int, how: str) -> None:
    num_rows_of = spread(num_rows, how)
    owner = [expert for expert, size in enumerate(num_rows_of) for _ in range(size)]
    for num_in, num_out in SIZES:
        x, weights = torch.randn(num_rows, num_in), torch.randn(NUM_EXPERTS, num_out, num_in)
        exact = [weights[expert].double() @ row.double() for expert, row in zip(owner, x, strict=True)]
        for numerics in ("reference", "fast"):
            y = moe_linear(x, weights.unbind(), num_rows_of, numerics=numerics)
            assert y.shape == (num_rows, num_out)
            for row, expected in zip(y, exact, strict=True):
                assert (row - expected).abs().max() < 1e-4  # float32 sums of up to 100 products of size 1


def test_a_count_of_rows_that_is_not_that_of_x_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="3 rows for the experts, 4 rows given"):
        moe_linear(torch.zeros(4, 8), torch.zeros(2, 8, 8).unbind(), [1, 2], numerics="fast")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(1, 1), (5, 1), (5, 2), (8, 8), (33, 7), (128, 8)])
def test_the_likeliest_experts_are_chosen_in_order_of_id(num_experts: int, num_chosen: int, normalize: bool) -> None:
    logits = torch.randn(100, num_experts) * 3
    experts, weights = choose_experts(logits, num_chosen, normalize=normalize)
    likely = torch.softmax(logits.double(), -1)
    for row in range(100):
        best = sorted(range(num_experts), key=lambda expert: -likely[row, expert])[:num_chosen]
        total = likely[row, best].sum() if normalize else 1.0
        assert experts[row].tolist() == sorted(best)
        assert (weights[row] - likely[row, sorted(best)] / total).abs().max() < 1e-6
    for rows in BATCHES:
        again = choose_experts(logits[rows].clone(), num_chosen, normalize=normalize)
        assert torch.equal(again[0], experts[rows]) and torch.equal(again[1], weights[rows])


def test_of_equally_likely_experts_the_lower_ids_are_chosen() -> None:
    """Seen to fail with `topk`, which promises nothing of equals."""
    logits = torch.randint(3, (100, 40)).float()
    experts, _ = choose_experts(logits, 6, normalize=True)
    for row, chosen in zip(logits.tolist(), experts.tolist(), strict=True):
        assert chosen == sorted(sorted(range(40), key=lambda expert: (-row[expert], expert))[:6])


def make_experts(hidden: int, inner: int, numerics: Any) -> Experts:
    torch.manual_seed(1)
    gate, up, down = (
        torch.randn(NUM_EXPERTS, inner, hidden),
        torch.randn(NUM_EXPERTS, inner, hidden),
        torch.randn(NUM_EXPERTS, hidden, inner),
    )
    return Experts(gate=gate.unbind(), up=up.unbind(), down=(down / inner).unbind(), numerics=numerics)


@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (7, 33), (60, 99), (64, 40)])
@pytest.mark.parametrize("favourites", [1, 2, NUM_EXPERTS])
def test_a_token_is_the_weighted_sum_of_its_experts_and_of_nothing_else(favourites: int, hidden: int, inner: int) -> None:
    """`favourites`: all tokens choose among so many experts; the others are chosen by nobody."""
    x, logits = torch.randn(100, hidden), torch.randn(100, NUM_EXPERTS)
    logits[:, favourites:] -= 1000
    chosen, weights = choose_experts(logits, min(2, favourites), normalize=True)
    exact = torch.zeros(100, hidden, dtype=torch.float64)
    layer = make_experts(hidden, inner, "reference")
    for row in range(100):
        for expert, weight in zip(chosen[row].tolist(), weights[row].double(), strict=True):
            gate, up = layer.gate[expert].double() @ x[row].double(), layer.up[expert].double() @ x[row].double()
            exact[row] += weight * (layer.down[expert].double() @ (gate * torch.sigmoid(gate) * up))
    size = exact.abs().max()
    for numerics in ("reference", "fast"):
        layer = make_experts(hidden, inner, numerics)
        whole = layer(x, chosen, weights)
        assert (whole - exact).abs().max() < 1e-5 * size
        if numerics == "reference":
            for rows in BATCHES:
                assert torch.equal(layer(x[rows].clone(), chosen[rows], weights[rows]), whole[rows]), rows


def test_bfloat16_is_rounded_once_a_row() -> None:
    """Experts that are all alike give together what one of them gives. Seen to fail with the sum rounded after each expert."""
    x, logits = torch.randn(20, 64).bfloat16(), torch.randn(20, NUM_EXPERTS)
    gate, up, down = torch.randn(40, 64).bfloat16(), torch.randn(40, 64).bfloat16(), torch.randn(64, 40).bfloat16()
    layer = Experts(gate=(gate,) * NUM_EXPERTS, up=(up,) * NUM_EXPERTS, down=(down,) * NUM_EXPERTS, numerics="fast")
    one = layer(x, torch.zeros(20, 1, dtype=torch.int64), torch.ones(20, 1))
    together = layer(x, *choose_experts(logits, NUM_EXPERTS, normalize=True))
    assert together.dtype == torch.bfloat16 and torch.equal(together, one)
    exact = (torch.nn.functional.silu(x.float() @ gate.float().T) * (x.float() @ up.float().T)) @ down.float().T
    assert (one - exact).abs().max() < 0.02 * exact.abs().max()  # 8 bits of mantissa through two linears
