"""Dropout keeps its rate and its mean, and gradients go where numbers were kept."""

from __future__ import annotations

import pytest
import torch

from peftcli.kernels.dropout import dropout, keep, keep_mask

CPU = torch.device("cpu")
LEVEL = 1 / 256  # of a byte


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_every_number_is_dropped_with_the_same_probability(p: float) -> None:
    torch.manual_seed(0)
    rows, columns = 2001, 503
    kept = -keep_mask(torch.Size([rows, columns]), p, CPU).double()
    of_a_row = p * (1 - p) / columns + LEVEL**2 / 4  # variance at most: of its numbers, its level
    assert kept.mean().item() == pytest.approx(1 - p, abs=4 * (of_a_row / rows) ** 0.5)
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * (p * (1 - p) / rows) ** 0.5


def test_a_row_drops_by_one_of_the_two_nearest_levels() -> None:
    torch.manual_seed(0)
    p = 12.75 * LEVEL
    dropped = 1 + keep_mask(torch.Size([200, 20_000]), p, CPU).double().mean(1)
    low = (dropped / LEVEL - 12.5) < 0
    assert low.double().mean().item() == pytest.approx(0.25, abs=0.1)
    for rate, rows in ((12 * LEVEL, low), (13 * LEVEL, ~low)):
        assert dropped[rows].mean().item() == pytest.approx(rate, rel=0.01)


def test_neighbours_that_share_a_draw_are_independent() -> None:
    torch.manual_seed(0)
    mask = keep_mask(torch.Size([200_000, 8]), 0.3, CPU)
    assert (torch.corrcoef(mask.double().T) - torch.eye(8)).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_what_is_kept_keeps_its_bits_and_the_rest_is_zero(dtype: torch.dtype) -> None:
    x = torch.tensor([[-1.5, float("nan"), float("inf")], [3.1, -float("inf"), -0.0]], dtype=dtype)
    mask = torch.tensor([[-1, 0, -1], [-1, 0, 0]], dtype=torch.int8)
    wanted = torch.tensor([[-1.5, 0.0, float("inf")], [3.1, 0.0, 0.0]], dtype=dtype)
    for given in (x, x.T.contiguous().T):
        assert torch.equal(keep(given, mask), wanted)
        assert torch.equal(keep(given, mask != 0), wanted)


def test_torchs_seed_decides_what_is_dropped() -> None:
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append([keep_mask(torch.Size([50]), 0.5, CPU) for _ in range(2)])
    same, again, other = drawn
    assert torch.equal(same[0], again[0])
    assert torch.equal(same[1], again[1])
    assert not torch.equal(same[0], same[1])
    assert not torch.equal(same[0], other[0])


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 1), (0, 4)])
def test_outputs_and_gradients_are_masked_and_scaled_alike(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = (torch.rand(shape, dtype=torch.float64) + 1).requires_grad_()
    y = dropout(x, 0.4)
    kept, gain = y.detach() != 0, 1 / 0.6
    torch.testing.assert_close(y, x * kept * gain)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy * kept * gain)


@pytest.mark.filterwarnings("ignore")
def test_compiled_draws_are_those_of_plain_code_and_not_one_for_all() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([dropout(x, 0.5), dropout(x, 0.5)])

    x, drawn = torch.ones(40, 50), []
    for call in (twice, torch.compile(twice, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(3)
        drawn.append(call(x))
    assert torch.equal(*drawn)
    assert not torch.equal(*drawn[1])


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings break it when they are errors
def test_compilation_sees_through_it() -> None:
    x = torch.ones(300, requires_grad=True)
    y = torch.compile(dropout, backend="aot_eager", fullgraph=True)(x, 0.5)
    assert set(y.tolist()) == {0.0, 2.0}
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())
