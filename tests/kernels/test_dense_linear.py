"""The node around a dense change of W: its own equation forward and backward, against float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from peftcli.kernels.dense_linear import dense_linear, dense_linear_ref

SHAPES = [((3,), 5, 7), ((2, 9), 13, 4), ((1, 1, 6), 8, 8), ((17, 3), 1, 5)]


class Outer(NamedTuple):
    """dW = s u v'."""

    s: float

    def make(self, W: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
        return self.s * torch.outer(*parts)

    def pull(
        self, G: Tensor, W: Tensor | None, parts: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        u, v = parts
        return self.s * (G @ v), self.s * (u @ G)


def operands(batch: tuple[int, ...], d_in: int, d_out: int) -> tuple[Tensor, ...]:
    torch.manual_seed(4)
    sizes = [(*batch, d_in), (d_out, d_in), (d_out,), (d_out,), (d_in,)]
    x, W, b, u, v = (torch.randn(size, dtype=torch.float64) for size in sizes)
    return x.requires_grad_(), W, b, u.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize(("batch", "d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("beside", [True, False])
def test_values_and_gradients_equal_the_reference(
    batch: tuple[int, ...], d_in: int, d_out: int, beside: bool
) -> None:
    x, W, b, u, v = operands(batch, d_in, d_out)
    W = W if beside else None
    y, y_ref = (f(x, W, b, Outer(0.3), u, v) for f in (dense_linear, dense_linear_ref))
    torch.testing.assert_close(y, y_ref, atol=1e-12, rtol=1e-12)
    dy = torch.randn_like(y)
    grads, wanted = (torch.autograd.grad(out, (x, u, v), dy) for out in (y, y_ref))
    torch.testing.assert_close(grads, wanted, atol=1e-11, rtol=1e-11)


def test_gradients_pass_the_numerical_check() -> None:
    x, W, b, u, v = operands((2, 3), 5, 4)
    assert torch.autograd.gradcheck(
        lambda *t: dense_linear(t[0], W, b, Outer(1.5), *t[1:]), (x, u, v)
    )


def test_what_the_backward_pass_needs_is_the_input_and_the_parameters() -> None:
    x, W, b, u, v = operands((6,), 5, 4)
    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        dense_linear(x, W, b, Outer(1.0), u, v)
    assert {t.data_ptr() for t in held} == {t.data_ptr() for t in (x, W, u, v)}


def test_the_frozen_weight_is_left_alone() -> None:
    x, W, b, u, v = operands((6,), 5, 4)
    before = W.clone()
    dense_linear(x, W, b, Outer(1.0), u, v).sum().backward()
    assert torch.equal(W, before)


def test_an_input_that_needs_no_gradient_costs_none() -> None:
    x, W, b, u, v = operands((6,), 5, 4)
    dense_linear(x.detach(), W, b, Outer(1.0), u, v).sum().backward()
    assert x.grad is None
    assert u.grad is not None


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_keeps_a_change_that_its_weight_would_round_away(autocast: bool) -> None:
    """1 + 2^-10 is 1 in bfloat16; a product of its own keeps the sum of 512 such changes, 1/2."""
    kind = torch.float32 if autocast else torch.bfloat16
    x, W = torch.ones(1, 512, dtype=kind), torch.ones(1, 512, dtype=kind)
    W[:, ::2] = -1
    u = torch.full((1,), 2.0**-10, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = dense_linear(x, W, None, Outer(1.0), u, torch.ones(512))
    assert y.dtype == torch.bfloat16
    assert y.item() == 0.5
    y.float().sum().backward()
    assert u.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings break it when they are errors
def test_compilation_sees_through_it() -> None:
    x, W, b, u, v = operands((6,), 5, 4)
    compiled = torch.compile(dense_linear, backend="aot_eager", fullgraph=True)
    y, y_ref = (f(x, W, b, Outer(0.5), u, v) for f in (compiled, dense_linear_ref))
    torch.testing.assert_close(y, y_ref)
    grads, wanted = (torch.autograd.grad(out.sum(), (x, u, v)) for out in (y, y_ref))
    torch.testing.assert_close(grads, wanted)
