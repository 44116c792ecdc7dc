"""The product with an elementwise product of low-rank matrices, as a LoRA of the squared rank and
as a dense change, against its equation in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcli.kernels.loha_linear import Pairs, as_lora, loha_linear, loha_linear_ref

SHAPES = [((3,), 5, 7, 2), ((2, 9), 13, 16, 1), ((1, 1, 6), 8, 8, 8), ((17, 3), 1, 5, 1)]


def operands(
    batch: tuple[int, ...], d_in: int, d_out: int, r: int
) -> tuple[Tensor, Tensor, Tensor, Pairs]:
    torch.manual_seed(5)
    sizes = [(*batch, d_in), (d_out, d_in), (d_out,), *[(d_out, r), (r, d_in)] * 2]
    x, W, b, *p = (torch.randn(size, dtype=torch.float64) for size in sizes)
    return x.requires_grad_(), W, b, Pairs(*(t.requires_grad_() for t in p))


@pytest.mark.parametrize(("batch", "d_in", "d_out", "r"), SHAPES)
def test_values_and_gradients_equal_the_reference(
    batch: tuple[int, ...], d_in: int, d_out: int, r: int
) -> None:
    x, W, b, p = operands(batch, d_in, d_out, r)
    y, y_ref = (f(x, W, b, p, 0.7) for f in (loha_linear, loha_linear_ref))
    torch.testing.assert_close(y, y_ref, atol=1e-12, rtol=1e-12)
    dy = torch.randn_like(y)
    grads, wanted = (torch.autograd.grad(out, (x, *p), dy) for out in (y, y_ref))
    torch.testing.assert_close(grads, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(("d_in", "d_out", "r"), [(5, 4, 2), (8, 9, 1)])  # dense; as a LoRA
def test_gradients_pass_the_numerical_check(d_in: int, d_out: int, r: int) -> None:
    x, W, b, p = operands((2, 3), d_in, d_out, r)
    f = lambda x, *p: loha_linear(x, W, b, Pairs(*p), 1.3)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, *p))


def test_the_change_is_a_lora_of_the_squared_rank() -> None:
    *_, p = operands((1,), 7, 5, 3)
    A, B = as_lora(p)
    assert A.shape == (9, 7)
    torch.testing.assert_close(B @ A, (p.W1a @ p.W1b) * (p.W2a @ p.W2b))
