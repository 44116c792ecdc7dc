"""The product with a modulated weight against its equation in float64, on odd shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcli.kernels.modulated_linear import modulated_linear, modulated_linear_ref

SHAPES = [((3,), 5, 7, 1), ((2, 9), 13, 4, 3), ((1, 1, 6), 8, 8, 8), ((17, 3), 1, 5, 2)]


def operands(batch: tuple[int, ...], d_in: int, d_out: int, r: int) -> list[Tensor]:
    torch.manual_seed(6)
    sizes = [(*batch, d_in), (d_out, d_in), (d_out,), (d_out, r), (r, d_in)]
    x, W, b, B, A = (torch.randn(size, dtype=torch.float64) for size in sizes)
    return [x.requires_grad_(), W, b, B.requires_grad_(), A.requires_grad_()]


@pytest.mark.parametrize(("batch", "d_in", "d_out", "r"), SHAPES)
@pytest.mark.parametrize(("scale", "c"), [(0.7, 0.0), (1.0, -1.0)])
def test_values_and_gradients_equal_the_reference(
    batch: tuple[int, ...], d_in: int, d_out: int, r: int, scale: float, c: float
) -> None:
    x, W, b, B, A = operands(batch, d_in, d_out, r)
    y, y_ref = (f(x, W, b, B, A, scale, c) for f in (modulated_linear, modulated_linear_ref))
    torch.testing.assert_close(y, y_ref, atol=1e-12, rtol=1e-12)
    dy = torch.randn_like(y)
    grads, wanted = (torch.autograd.grad(out, (x, B, A), dy) for out in (y, y_ref))
    torch.testing.assert_close(grads, wanted, atol=1e-11, rtol=1e-11)


def test_gradients_pass_the_numerical_check() -> None:
    x, W, b, B, A = operands((2, 3), 5, 4, 2)
    f = lambda x, B, A: modulated_linear(x, W, b, B, A, 1.3)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, B, A))
