"""The sparse change of a weight against its reference in float64, on odd shapes, forward and
backward.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcli.kernels import sparse_linear as module
from peftcli.kernels.sparse_linear import add_entries, sparse_linear, sparse_linear_ref, spread

SHAPES = [((3,), 5, 7, 1), ((2, 9), 13, 4, 30), ((1, 1, 6), 8, 8, 64), ((17, 3), 1, 5, 2)]


def operands(
    batch: tuple[int, ...], d_in: int, d_out: int, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    indices = torch.randperm(d_in * d_out, generator=draw)[:k].int()
    sizes = [(*batch, d_in), (k,), (d_out, d_in), (d_out,)]
    x, values, W, b = (
        torch.randn(size, generator=draw, dtype=torch.float64).to(dtype) for size in sizes
    )
    return x.requires_grad_(), indices, values.requires_grad_(), W, b


@pytest.mark.parametrize(("batch", "d_in", "d_out", "k"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("few", [0.0, 1.0], ids=["dense", "sampled"])
def test_values_and_gradients_equal_the_reference(
    batch: tuple[int, ...],
    d_in: int,
    d_out: int,
    k: int,
    bias: bool,
    few: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "FEW", few)
    monkeypatch.setattr(module, "AT_ONCE", 60)  # several pieces
    x, indices, values, W, b = operands(batch, d_in, d_out, k, torch.float64)
    bias_or_none = b if bias else None
    dy = torch.randn(*batch, d_out, dtype=torch.float64)
    y = sparse_linear(x, indices, values, d_out, W, bias_or_none)
    y_ref = sparse_linear_ref(x, indices, values, d_out, W, bias_or_none)
    torch.testing.assert_close(y, y_ref, atol=1e-12, rtol=1e-12)
    grads, wanted = (torch.autograd.grad(out, (x, values), dy) for out in (y, y_ref))
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-11, rtol=1e-11)


def test_without_a_weight_it_is_the_sparse_product_alone() -> None:
    x, indices, values, *_ = operands((2, 5), 6, 4, 9, torch.float64)
    alone = sparse_linear(x, indices, values, 4)
    torch.testing.assert_close(alone, sparse_linear_ref(x, indices, values, 4))
    assert torch.autograd.gradcheck(lambda x, v: sparse_linear(x, indices, v, 4), (x, values))


def test_gradients_pass_the_numerical_check() -> None:
    x, indices, values, W, b = operands((2, 3), 5, 4, 6, torch.float64)
    assert torch.autograd.gradcheck(lambda x, v: sparse_linear(x, indices, v, 4, W, b), (x, values))


def test_the_watcher_sees_the_gradient_of_the_dense_weight() -> None:
    x, indices, values, W, b = operands((4, 3), 6, 5, 3, torch.float64)
    seen: list[Tensor] = []
    (sparse_linear(x, indices, values, 5, W, b, seen.append) ** 2).sum().backward()
    dense = spread(indices, values.detach(), (5, 6)).add_(W).requires_grad_()
    (torch.nn.functional.linear(x.detach(), dense, b) ** 2).sum().backward()
    torch.testing.assert_close(seen[0], dense.grad)
    torch.testing.assert_close(values.grad, dense.grad.flatten()[indices])


def test_neither_a_dense_weight_nor_its_gradient_is_kept_for_the_backward_pass() -> None:
    x, indices, values, W, b = operands((4,), 64, 64, 3, torch.float32)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        sparse_linear(x, indices, values, 64, W, b).sum()
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, indices, values, W)}


def test_an_input_that_needs_no_gradient_costs_none() -> None:
    x, indices, values, W, b = operands((4,), 6, 5, 2, torch.float32)
    sparse_linear(x.detach(), indices, values, 5, W, b).sum().backward()
    assert x.grad is None
    assert values.grad is not None


def test_a_bfloat16_weight_is_rounded_once_and_the_values_stay_float32() -> None:
    x, indices, values, W, b = operands((64,), 96, 80, 500, torch.float64)
    exact = sparse_linear_ref(x, indices, values, len(W), W, b)
    half_x, half_W, half_b = (t.detach().bfloat16() for t in (x, W, b))
    master = values.detach().float().requires_grad_()
    mixed = sparse_linear(half_x, indices, master, 80, half_W, half_b)
    plain = sparse_linear_ref(half_x, indices, values.detach().bfloat16(), len(W), half_W, half_b)
    assert mixed.dtype == torch.bfloat16
    assert (mixed - exact).norm() <= 2 * (plain - exact).norm()
    mixed.sum().backward()
    assert master.grad.dtype == torch.float32
    summed = (half_W.float() + spread(indices, master.detach(), (80, 96))).bfloat16()
    assert torch.equal(add_entries(half_W, indices, master), summed)


def test_autocast_runs_the_product_in_its_type() -> None:
    x, indices, values, W, b = operands((4,), 6, 5, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_linear(x, indices, values, 5, W, b)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert values.grad.dtype == torch.float32


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings break it when they are errors
@pytest.mark.parametrize("k", [1, 90], ids=["sampled", "dense"])
def test_compilation_sees_through_it(k: int) -> None:
    x, indices, values, W, b = operands((4,), 24, 20, k, torch.float32)
    compiled = torch.compile(sparse_linear, backend="aot_eager", fullgraph=True)
    y = compiled(x, indices, values, 20, W, b)
    torch.testing.assert_close(y, sparse_linear_ref(x, indices, values, len(W), W, b))
    y.sum().backward()
    assert values.grad is not None
