"""Attention of packed rows, segment by segment, against one product under a dense mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcli.kernels.packed_attention import Segment, packed_attention, packed_attention_ref

LAYOUTS = {
    "one": (Segment(0, 7),),
    "of one length": (Segment(0, 4), Segment(4, 8), Segment(8, 12)),
    "apart": (Segment(0, 3), Segment(3, 4), Segment(4, 12)),
    "shared beginning": (Segment(0, 5), Segment(5, 9, 0, 5), Segment(9, 10, 0, 5)),
    "two beginnings": (
        Segment(0, 2),
        Segment(2, 6, 0, 2),
        Segment(6, 9),
        Segment(9, 11, 6, 9),
        Segment(11, 14, 6, 9),
    ),
}


def operands(T: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    sizes = [(1, 6, T, 16), (1, groups, T, 16), (1, groups, T, 16)]
    made = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in sizes]
    return [t.requires_grad_() for t in made]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_values_and_gradients_are_those_of_a_dense_mask(layout: str, groups: int) -> None:
    segments = LAYOUTS[layout]
    inputs = operands(segments[-1].stop, groups, torch.float64)
    ours, theirs = (f(*inputs, segments, 0.3) for f in (packed_attention, packed_attention_ref))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    dy = torch.randn(ours.shape, dtype=torch.float64)
    grads, wanted = (torch.autograd.grad(y, inputs, dy) for y in (ours, theirs))
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_errs_no_more_than_the_reference_in_bfloat16(layout: str) -> None:
    segments = LAYOUTS[layout]
    exact = packed_attention_ref(*operands(segments[-1].stop, 2, torch.float64), segments, 0.3)
    half = operands(segments[-1].stop, 2, torch.bfloat16)
    ours, plain = (f(*half, segments, 0.3) for f in (packed_attention, packed_attention_ref))
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()


def test_dropout_is_drawn_and_has_a_gradient() -> None:
    segments = LAYOUTS["shared beginning"]
    inputs = operands(10, 2, torch.float32)
    one, two = (packed_attention(*inputs, segments, 0.3, dropout=0.5) for _ in range(2))
    assert not torch.equal(one, two)
    one.sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in inputs)
