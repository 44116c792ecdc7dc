"""The fused operation against its reference in float64, on odd shapes, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcli.kernels import choice
from peftcli.kernels.lora_linear import Branch, lora_linear, lora_linear_ref, lora_linears

SHAPES = [((3,), 5, 7, 1), ((2, 9), 13, 4, 3), ((1, 1, 6), 8, 8, 8), ((17, 3), 1, 5, 2)]


def operands(
    batch: tuple[int, ...], d_in: int, d_out: int, r: int, dtype: torch.dtype
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    sizes = [(*batch, d_in), (d_out, d_in), (d_out,), (r, d_in), (d_out, r)]
    x, W, b, A, B = (
        torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes
    )
    return [x.requires_grad_(), W, b, A.requires_grad_(), B.requires_grad_()]


@pytest.mark.parametrize(("batch", "d_in", "d_out", "r"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_the_reference(
    batch: tuple[int, ...], d_in: int, d_out: int, r: int, bias: bool
) -> None:
    x, W, b, A, B = operands(batch, d_in, d_out, r, torch.float64)
    b = b if bias else None
    dy = torch.randn(*batch, d_out, dtype=torch.float64)
    y, y_ref = lora_linear(x, W, b, A, B, 0.7), lora_linear_ref(x, W, b, A, B, 0.7)
    torch.testing.assert_close(y, y_ref, atol=1e-12, rtol=1e-12)
    grads, wanted = (torch.autograd.grad(out, (x, A, B), dy) for out in (y, y_ref))
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("count", [2, 3])
def test_branches_together_are_the_branches_apart(count: int) -> None:
    """Other widths and ranks, with and without biases; a branch that the loss leaves out, too."""
    x, *_ = operands((3, 5), 7, 4, 2, torch.float64)
    draw = torch.Generator().manual_seed(1)
    branches = []
    for i, (d_out, r) in enumerate([(4, 2), (9, 1), (6, 5)][:count]):
        sizes = [(d_out, 7), (d_out,), (r, 7), (d_out, r)]
        W, b, A, B = (torch.randn(s, generator=draw, dtype=torch.float64) for s in sizes)
        branch = Branch(W, b if i else None, A.requires_grad_(), B.requires_grad_(), 0.5 + i)
        branches.append(branch)
    together, apart = lora_linears(x, branches), [lora_linear_ref(x, *b) for b in branches]
    for y, y_ref in zip(together, apart, strict=True):
        torch.testing.assert_close(y, y_ref, atol=1e-12, rtol=1e-12)
    inputs = [x, *(t for b in branches for t in (b.A, b.B))]
    for used in (range(count), range(1)):
        losses = [sum(ys[i].square().sum() for i in used) for ys in (together, apart)]
        grads = [
            torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
            for loss in losses
        ]
        for g, w in zip(*grads, strict=True):
            torch.testing.assert_close(g, w, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_dropout_takes_the_same_numbers_from_all_branches(count: int, kernels: str) -> None:
    """With A = 1 and B = 1 the output is W x and the dropped input, and so is the gradient."""
    x = torch.rand(200, 6, dtype=torch.float64).add_(1).requires_grad_()
    eye, W = torch.eye(6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)
    branches = [Branch(W, None, eye.clone().requires_grad_(), eye, 1.0) for _ in range(count)]
    torch.manual_seed(0)
    with choice.using(kernels, torch.device("cpu")):
        ys = [y - x @ W.T for y in lora_linears(x, branches, 0.25)]
    kept = ys[0].detach().abs() > 0.5
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.04)
    for y in ys:
        torch.testing.assert_close(y, x / 0.75 * kept)
    inputs = [x, *(branch.A for branch in branches)]
    dx, *dA = torch.autograd.grad(sum(y.sum() for y in ys), inputs)
    torch.testing.assert_close(dx, count * kept.double() / 0.75)
    for gradient, y in zip(dA, ys, strict=True):
        torch.testing.assert_close(gradient, y.detach().sum(0).expand(6, 6))


def test_gradients_pass_the_numerical_check() -> None:
    x, W, b, A, B = operands((2, 3), 5, 4, 2, torch.float64)
    assert torch.autograd.gradcheck(lambda x, A, B: lora_linear(x, W, b, A, B, 1.3), (x, A, B))


def test_an_input_that_needs_no_gradient_costs_none() -> None:
    x, W, b, A, B = operands((4,), 6, 5, 2, torch.float32)
    lora_linear(x.detach(), W, b, A, B, 1.0).sum().backward()
    assert x.grad is None
    assert A.grad is not None


def test_float32_masters_over_a_bfloat16_base_err_no_more_than_plain_bfloat16() -> None:
    x, W, b, A, B = operands((64,), 96, 80, 8, torch.float64)
    exact = lora_linear_ref(x, W, b, A, B, 0.5)
    half = [t.detach().bfloat16() for t in (x, W, b)]
    masters = [t.detach().float().requires_grad_() for t in (A, B)]
    mixed = lora_linear(*half, *masters, 0.5)
    plain = lora_linear_ref(*half, A.detach().bfloat16(), B.detach().bfloat16(), 0.5)
    assert mixed.dtype == torch.bfloat16
    assert (mixed - exact).norm() <= 2 * (plain - exact).norm()
    mixed.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in masters)


def test_autocast_runs_the_products_in_its_type() -> None:
    x, W, b, A, B = operands((4,), 6, 5, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, W, b, A, B, 1.0)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert A.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings break it when they are errors
def test_compilation_sees_through_it() -> None:
    x, W, b, A, B = operands((4,), 6, 5, 2, torch.float32)
    compiled = torch.compile(lora_linear, backend="aot_eager", fullgraph=True)
    y = compiled(x, W, b, A, B, 0.5)
    torch.testing.assert_close(y, lora_linear_ref(x, W, b, A, B, 0.5))
    y.sum().backward()
    assert B.grad is not None
