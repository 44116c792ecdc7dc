"""Attention of packed rows as batches of products, against one product under a dense mask."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from peftcli.kernels import batched_attention as batched
from peftcli.kernels.packed_attention import Segment, packed_attention, packed_attention_ref


def behind(prefix: tuple[int, int], *lengths: int) -> list[Segment]:
    ends = [prefix[1]]
    for length in lengths:
        ends.append(ends[-1] + length)
    return [Segment(a, b, *prefix) for a, b in pairwise(ends)]


LAYOUTS = {
    "one token": (Segment(0, 1),),
    "of one length": tuple(behind((0, 0), 5, 5, 5)),
    "far apart": tuple(behind((0, 0), 1, 40, 2, 30, 3)),
    "two beginnings": (
        Segment(0, 3),
        *behind((0, 3), 4, 9, 1),
        Segment(17, 22),
        *behind((17, 22), 6, 6, 5),
    ),
}


def operands(T: int, G: int, P: int, dtype: torch.dtype) -> list[Tensor]:
    """q of 6 heads, k, v, and keys and values before the row."""
    draw = torch.Generator().manual_seed(T)
    sizes = [(1, 6, T, 8), *[(1, G, T, 8)] * 2, *[(1, G, P, 8)] * 2]
    made = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in sizes]
    return [t.requires_grad_() for t in made]


@pytest.mark.parametrize(
    ("scores", "queries", "kept"), [(2**20, 128, 256), (300, 128, 0), (2**20, 4, 12), (300, 7, 0)]
)
@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("G", [1, 2, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_those_of_a_dense_mask(
    layout: str,
    G: int,
    P: int,
    scores: int,
    queries: int,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batched, "SCORES", scores)  # all at once, and in many pieces
    monkeypatch.setattr(batched, "QUERIES", queries)
    monkeypatch.setattr(batched, "KEPT", kept)
    batched.plan.cache_clear()
    segments = LAYOUTS[layout]
    inputs = operands(segments[-1].stop, G, P, torch.float64)
    q, k, v, *before = inputs
    held = (before[0], before[1]) if P else None
    ours = batched.batched_attention(q, k, v, segments, 0.3, held).transpose(1, 2)
    theirs = packed_attention_ref(q, k, v, segments, 0.3, held)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
    inputs = inputs if P else inputs[:3]
    dy = torch.randn(ours.shape, dtype=torch.float64)
    grads, wanted = (torch.autograd.grad(y, inputs, dy) for y in (ours, theirs))
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-12, rtol=1e-10)


def test_every_token_is_a_query_once_and_like_lengths_are_together() -> None:
    batched.plan.cache_clear()
    segments = tuple(behind((0, 0), 50, 10, 48, 9, 50, 300))
    batches = batched.plan(segments, 1, 1, 0)
    sizes = [(*batch.queries.shape, batch.keys.shape[1]) for batch in batches]
    wanted = [(1, 1, 128, 128), (3, 1, 50, 50), (2, 1, 10, 10), (1, 1, 128, 256), (1, 1, 44, 300)]
    assert sizes == wanted
    rows = torch.cat([batch.queries.flatten() for batch in batches])
    assert sorted(rows[rows < 467].tolist()) == list(range(467))


def test_it_is_taken_in_bfloat16_on_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain = batched.batched_attention
    monkeypatch.setattr(
        "peftcli.kernels.packed_attention.batched_attention",
        lambda *args: seen.append(args[0].dtype) or plain(*args),
    )
    segments = LAYOUTS["far apart"]
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, *_ = operands(segments[-1].stop, 2, 0, dtype)
        packed_attention(q, k, v, segments, 0.3)
        packed_attention(q, k, v, segments, 0.3, dropout=0.5)
        with batched.one_by_one():
            packed_attention(q, k, v, segments, 0.3)
    assert seen == [torch.bfloat16]
