"""The product with a sparse spectrum's weight equals the sum of its cosines, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peftcli.kernels.fourier_linear import fourier_linear, fourier_linear_ref, fourier_weight


@pytest.mark.parametrize(
    ("positions", "c", "shape", "wanted"),
    [
        ([1], [4.0], (2, 2), [[1, -1], [1, -1]]),
        ([5], [8.0], (2, 4), [[1, 0, -1, 0], [-1, 0, 1, 0]]),
    ],
)
def test_worked_examples(
    positions: list[int], c: list[float], shape: tuple[int, int], wanted: list[list[float]]
) -> None:
    dW = fourier_weight(torch.tensor(c), torch.tensor(positions), shape, 1.0)
    torch.testing.assert_close(dW, torch.tensor(wanted, dtype=torch.float32))


def by_cosines(c: Tensor, positions: Tensor, shape: tuple[int, int], scale: float) -> Tensor:
    """dW[j, k] = s / (O I) sum_i c_i cos(2 pi (row_i j / O + col_i k / I)), entry by entry."""
    d_out, d_in = shape
    rows, columns = (positions // d_in).double(), (positions % d_in).double()
    j = torch.arange(d_out)[:, None, None] * rows / d_out  # (O, 1, n)
    k = torch.arange(d_in)[None, :, None] * columns / d_in  # (1, I, n)
    return scale / (d_out * d_in) * (torch.cos(2 * torch.pi * (j + k)) @ c)


@pytest.mark.parametrize("shape", [(5, 7), (8, 3), (1, 1), (6, 6), (1, 4), (2, 1)])
@pytest.mark.parametrize("form", [fourier_linear, fourier_linear_ref])
def test_output_and_gradients_equal_the_sum_of_cosines(
    shape: tuple[int, int], form: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    d_out, d_in = shape
    positions = torch.randperm(d_out * d_in)[: max(1, d_out * d_in // 3)].int()
    c = torch.randn(len(positions), dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, d_in, dtype=torch.float64, requires_grad=True)
    W, b = torch.randn(d_out, d_in).double(), torch.randn(d_out).double()
    y = form(x, W, b, c, positions, shape, 3.0)
    wanted = F.linear(x, W + by_cosines(c, positions, shape, 3.0), b)
    torch.testing.assert_close(y, wanted)
    dy = torch.randn_like(y)
    ours, plain = (torch.autograd.grad(out, (x, c), dy) for out in (y, wanted))
    torch.testing.assert_close(ours, plain)


def test_bfloat16_is_as_near_as_plain_bfloat16_products() -> None:
    torch.manual_seed(0)
    positions, c = torch.randperm(64 * 48)[:100], torch.randn(100)
    x = torch.randn(32, 48)
    exact = fourier_linear_ref(x.double(), None, None, c.double(), positions, (64, 48), 50.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = fourier_linear(x, None, None, c, positions, (64, 48), 50.0)
        plain = fourier_linear_ref(x, None, None, c, positions, (64, 48), 50.0)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


def test_positions_that_mirror_each_other_add_up() -> None:
    """(1, 1) and (-1, -1) of a (3, 4) spectrum make one wave, and their gradients are equal."""
    x, W = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    c = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    both, one = torch.tensor([5, 11]), torch.tensor([5])
    y = fourier_linear(x, W, None, c, both, (3, 4), 1.0)
    torch.testing.assert_close(y, fourier_linear(x, W, None, c.sum()[None], one, (3, 4), 1.0))
    (dc,) = torch.autograd.grad(y.square().sum(), c)
    torch.testing.assert_close(dc[0], dc[1])
