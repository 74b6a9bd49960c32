"""The native mixture of experts equals its reference on every instruction path, and a token's bits are its own.

How: a loop over tokens and experts in float64 over odd sizes, rows around a group (4, 6), a slice (192) and what is computed at once, and
the ways rows can be spread over experts. Seen to fail with an expert's group begun one pair late, with `down` read in another order than it
is packed, with experts added in the order of how many chose them (bits), and with ties given to the higher id.
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels.expert_choice import choose_experts  # noqa: E402
from kernels.native.library import NativeLibrary, load_library  # noqa: E402
from kernels.native.network import NativeError  # noqa: E402
from kernels.native.ops import NativeOps  # noqa: E402
from tests.native_paths import PATHS  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[(path, dtype) for path in PATHS for dtype in DTYPES], ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def ops(request: pytest.FixtureRequest) -> NativeOps:
    path, dtype = request.param
    return NativeOps(path=path, dtype=dtype)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(1, 1), (5, 2), (8, 8), (16, 2), (33, 7), (128, 8)])
def test_experts_are_chosen_as_the_reference_does(path: str, num_experts: int, num_chosen: int, normalize: bool) -> None:
    logits = torch.randn(100, num_experts) * 3
    logits[50:] = logits[50:].round()  # many are equally likely
    logits[-1] = -1000.0
    logits[-1, num_experts // 2] = 0.0  # the others have no likelihood left
    experts, weights = NativeOps(path=path).choose_experts(logits, num_chosen, normalize=normalize)
    expected = choose_experts(logits, num_chosen, normalize=normalize)
    assert torch.equal(experts.long(), expected[0])
    assert torch.allclose(weights, expected[1], rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("path", PATHS)
def test_logits_that_are_not_finite_choose_experts_that_are_there(path: str) -> None:
    """What they give is not finite either, and is seen in the model's logits; it must not lead outside the weights."""
    logits = torch.randn(4, 9)
    logits[0, 3], logits[1, 8], logits[2], logits[3] = float("nan"), float("inf"), float("-inf"), float("nan")
    experts, weights = NativeOps(path=path).choose_experts(logits, 9, normalize=True)
    assert experts.tolist() == [list(range(9))] * 4
    assert weights.isnan().any(1).all()


class Mixture:
    """Random weights in one dtype, and what they give, token by token in float64."""

    def __init__(self, hidden: int, inner: int, num_experts: int, num_chosen: int, dtype: Any) -> None:
        self.num_chosen = num_chosen
        self.router = torch.randn(num_experts, hidden).to(dtype)
        self.gate, self.up = (torch.randn(2, num_experts, inner, hidden) / hidden**0.5).to(dtype)
        self.down = (torch.randn(num_experts, hidden, inner) / inner**0.5).to(dtype)

    def __call__(self, ops: NativeOps, x: Any, *, num_threads: int = 1) -> Any:
        weights = self.gate.unbind(), self.up.unbind(), self.down.unbind()
        return ops.experts(x, self.router, *weights, num_chosen=self.num_chosen, normalize=True, num_threads=num_threads)

    def exact(self, x: Any) -> Any:
        y = torch.zeros(x.shape, dtype=torch.float64)
        chosen, weights = choose_experts((x.double() @ self.router.double().T).float(), self.num_chosen, normalize=True)
        for expert, (gate, up, down) in enumerate(zip(self.gate, self.up, self.down, strict=True)):
            rows, rank = torch.where(chosen == expert)
            inputs = x[rows].double()
            gated = torch.nn.functional.silu(inputs @ gate.double().T) * (inputs @ up.double().T)
            y[rows] += weights[rows, rank, None].double() * (gated.to(x.dtype).double() @ down.double().T)
        return y


@pytest.mark.parametrize(
    ("num_rows", "hidden", "inner", "num_experts", "num_chosen"),
    [
        (1, 1, 1, 1, 1),
        (1, 64, 32, 16, 2),
        (2, 7, 33, 5, 2),
        (3, 99, 65, 4, 4),
        (7, 64, 40, 70, 3),
        (13, 130, 31, 3, 1),
        (40, 33, 64, 9, 9),
        (500, 20, 12, 2, 1),
        (600, 24, 10, 2, 2),
    ],
)
def test_a_token_is_the_weighted_sum_of_its_experts(
    ops: NativeOps, num_rows: int, hidden: int, inner: int, num_experts: int, num_chosen: int
) -> None:
    """One token, more experts than a panel, all experts chosen, more rows than a slice and than are computed at once."""
    mixture, x = Mixture(hidden, inner, num_experts, num_chosen, ops.dtype), torch.randn(num_rows, hidden).to(ops.dtype)
    y = mixture(ops, x)
    assert (y - mixture.exact(x)).abs().max() < (1e-5 if ops.dtype == torch.float32 else 0.02)  # bf16: what `down` reads is rounded
    assert torch.equal(mixture(ops, x, num_threads=3), y)


@pytest.mark.parametrize("favourites", [1, 2, 4])
def test_experts_that_nobody_chose_and_one_that_all_chose(ops: NativeOps, favourites: int) -> None:
    mixture, x = Mixture(24, 40, 6, min(2, favourites), ops.dtype), torch.rand(210, 24).to(ops.dtype)
    mixture.router[:] -= 2
    mixture.router[1 : 1 + favourites] += 4  # rows of x are positive: these win
    unused = [e for e in range(6) if not 1 <= e <= favourites]
    for weights in (mixture.gate, mixture.up, mixture.down):
        weights[unused] = float("nan")
    assert (mixture(ops, x) - mixture.exact(x)).abs().max() < (1e-5 if ops.dtype == torch.float32 else 0.02)


def test_a_token_is_the_same_in_every_batch(ops: NativeOps) -> None:
    """Bits, not nearness: whoever else is there and however many chose the same experts."""
    mixture, x = Mixture(99, 33, 5, 3, ops.dtype), torch.randn(450, 99).to(ops.dtype)
    whole = mixture(ops, x)
    for num_rows in (1, 2, 3, 5, 7, 12, 31, 200, 449):
        rows = torch.randperm(450)[:num_rows]
        assert torch.equal(mixture(ops, x[rows]), whole[rows]), num_rows


def test_paths_with_fused_multiply_add_agree_in_every_bit() -> None:
    """Of one reference cluster; float32 sums have one order on all paths (`ChosenKernels.bits`)."""
    mixture, x = Mixture(99, 33, 20, 3, torch.float32), torch.randn(30, 99)
    fused = [mixture(NativeOps(path=path), x) for path in PATHS if path != "portable"]
    assert all(torch.equal(y, fused[0]) for y in fused)


@pytest.mark.parametrize(("num_experts", "num_chosen"), [(2, 3), (2, 0), (5000, 2)])
def test_a_mixture_that_cannot_be_is_refused(num_experts: int, num_chosen: int) -> None:
    assert isinstance(load_library(), NativeLibrary)
    with pytest.raises(NativeError, match="1 to 4096 experts"):
        Mixture(2, 2, num_experts, num_chosen, torch.float32)(NativeOps(path="portable"), torch.zeros(1, 2))
