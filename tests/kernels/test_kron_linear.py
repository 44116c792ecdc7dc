"""The product with a Kronecker product beside a frozen weight, against the dense equation in
float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcli.kernels.kron_linear import Kron, kron_linear, kron_linear_ref

# batch, sides of W1, sides of W2, and the rank of W2's factors
SHAPES = [
    ((3,), (2, 3), (4, 5), None),
    ((2, 9), (3, 2), (5, 7), 2),
    ((1, 1, 6), (1, 1), (3, 4), 1),
    ((17, 3), (5, 1), (1, 3), None),
]
Shape = tuple[tuple[int, ...], tuple[int, int], tuple[int, int], int | None]


def operands(
    shape: Shape, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Kron]:
    batch, (a, c), (p, e), r = shape
    draw = torch.Generator().manual_seed(3)
    sizes = [(*batch, c * e), (a * p, c * e), (a * p,), (a, c), (p, r or e), (r or p, e)]
    tensors = [torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes]
    x, W, b, W1, W2a, W2b = tensors
    k = Kron(W1.requires_grad_(), W2a.requires_grad_() if r else None, W2b.requires_grad_())
    return x.requires_grad_(), W, b, k


def trained(x: Tensor, k: Kron) -> list[Tensor]:
    return [x, *(t for t in k if t is not None)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_the_reference(shape: Shape, bias: bool) -> None:
    x, W, b, k = operands(shape)
    y, y_ref = (f(x, W, b if bias else None, k, 0.7) for f in (kron_linear, kron_linear_ref))
    torch.testing.assert_close(y, y_ref, atol=1e-12, rtol=1e-12)
    dy = torch.randn_like(y)
    grads, wanted = (torch.autograd.grad(out, trained(x, k), dy) for out in (y, y_ref))
    torch.testing.assert_close(grads, wanted, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("shape", SHAPES[:2])
def test_gradients_pass_the_numerical_check(shape: Shape) -> None:
    x, W, b, k = operands(((2,), *shape[1:]))

    def f(x: Tensor, *t: Tensor) -> Tensor:
        return kron_linear(x, W, b, Kron(t[0], t[1] if shape[3] else None, t[-1]), 1.3)

    assert torch.autograd.gradcheck(f, trained(x, k))


@pytest.mark.parametrize("rank", [4, None])
def test_float32_masters_over_a_bfloat16_base_err_no_more_than_plain_bfloat16(
    rank: int | None,
) -> None:
    x, W, b, k = operands(((64,), (6, 8), (10, 12), rank))
    exact = kron_linear_ref(x, W, b, k, 0.5)
    half = [t.detach().bfloat16() for t in (x, W, b)]
    masters = Kron(*(None if t is None else t.detach().float().requires_grad_() for t in k))
    mixed = kron_linear(*half, masters, 0.5)
    plain = kron_linear_ref(*half, Kron(*(None if t is None else t.bfloat16() for t in k)), 0.5)
    assert mixed.dtype == torch.bfloat16
    assert (mixed - exact).norm() <= 2 * (plain - exact).norm()
    mixed.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in masters if t is not None)


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings break it when they are errors
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_compilation_sees_through_it(shape: Shape) -> None:
    x, W, b, k = operands(shape)
    compiled = torch.compile(kron_linear, backend="aot_eager", fullgraph=True)
    y, y_ref = (f(x, W, b, k, 0.5) for f in (compiled, kron_linear_ref))
    torch.testing.assert_close(y, y_ref)
    grads, wanted = (torch.autograd.grad(out.sum(), trained(x, k)) for out in (y, y_ref))
    torch.testing.assert_close(grads, wanted)
