"""The scaled LoRA linear against its equation in float64, on odd shapes, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcli.kernels.dora_linear import dora_linear, dora_linear_ref

SHAPES = [((3,), 5, 7, 1), ((2, 9), 13, 4, 3), ((1, 1, 6), 8, 8, 8), ((17, 3), 1, 5, 2)]


def operands(batch: tuple[int, ...], d_in: int, d_out: int, r: int, shift: str) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    c = (*batch, d_out) if shift == "by token" else (d_out,)
    sizes = [(*batch, d_in), (d_out, d_in), c, (r, d_in), (d_out, r), (d_out,)]
    x, W, c, *rest = (torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)
    c = c.requires_grad_(shift == "by token")
    return [x.requires_grad_(), W, c, *(t.requires_grad_() for t in rest)]


@pytest.mark.parametrize(("batch", "d_in", "d_out", "r"), SHAPES)
@pytest.mark.parametrize("shift", ["none", "bias", "by token"])
def test_values_and_gradients_equal_the_reference(
    batch: tuple[int, ...], d_in: int, d_out: int, r: int, shift: str
) -> None:
    x, W, c, A, B, g = operands(batch, d_in, d_out, r, shift)
    forms = (dora_linear, dora_linear_ref)
    y, y_ref = (f(x, W, None if shift == "none" else c, A, B, g, 0.7) for f in forms)
    torch.testing.assert_close(y, y_ref, atol=1e-12, rtol=1e-12)
    dy = torch.randn_like(y)
    trained = [x, A, B, g, *([c] if c.requires_grad else [])]
    grads, wanted = (torch.autograd.grad(out, trained, dy) for out in (y, y_ref))
    torch.testing.assert_close(grads, wanted, atol=1e-11, rtol=1e-11)


def test_gradients_pass_the_numerical_check() -> None:
    x, W, c, A, B, g = operands((2, 3), 5, 4, 2, "by token")
    f = lambda x, c, A, B, g: dora_linear(x, W, c, A, B, g, 1.3)  # noqa: E731
    assert torch.autograd.gradcheck(f, (x, c, A, B, g))


def test_float32_masters_over_a_bfloat16_base_err_no_more_than_plain_bfloat16() -> None:
    x, W, c, A, B, g = (t.detach() for t in operands((64,), 96, 80, 8, "bias"))
    exact = dora_linear_ref(x, W, c, A, B, g, 0.5)
    half = [t.bfloat16() for t in (x, W, c)]
    masters = [t.float().requires_grad_() for t in (A, B, g)]
    mixed = dora_linear(*half, *masters, 0.5)
    plain = dora_linear_ref(*half, *(t.bfloat16() for t in (A, B, g)), 0.5)
    assert mixed.dtype == torch.bfloat16
    assert (mixed - exact).norm() <= 2 * (plain - exact).norm()
    mixed.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in masters)


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings break it when they are errors
def test_compilation_sees_through_it() -> None:
    x, W, c, A, B, g = operands((6,), 5, 4, 2, "bias")
    compiled = torch.compile(dora_linear, backend="aot_eager", fullgraph=True)
    y, y_ref = (f(x, W, c, A, B, g, 0.5) for f in (compiled, dora_linear_ref))
    torch.testing.assert_close(y, y_ref)
    grads, wanted = (torch.autograd.grad(out.square().sum(), (x, A, B, g)) for out in (y, y_ref))
    torch.testing.assert_close(grads, wanted)
