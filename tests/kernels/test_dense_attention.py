"""Attention of batches as products against torch's own, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from peftcli.kernels import choice
from peftcli.kernels import dense_attention as module
from peftcli.kernels.dense_attention import blocks, dense_attention, is_dense
from peftcli.kernels.dropout import keep_mask

SHAPES = [(1, 1, 1, 2, 2, 1), (3, 4, 2, 7, 7, 5), (2, 6, 2, 5, 9, 4), (5, 2, 2, 13, 13, 3)]


def operands(B: int, H: int, G: int, T: int, N: int, D: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    sizes = [(B, T, H, D), (B, N, G, D), (B, N, G, D)]
    tensors = [torch.randn(s, generator=draw, dtype=torch.float64) for s in sizes]
    return [t.transpose(1, 2).requires_grad_() for t in tensors]


def masks(B: int, H: int, T: int, N: int) -> dict[str, dict[str, Any]]:
    draw = torch.Generator().manual_seed(2)
    seen = torch.rand(B, 1, T, N, generator=draw) < 0.7
    seen[..., 0] = True
    found: dict[str, dict[str, Any]] = {
        "none": {},
        "seen": {"mask": seen},
        "of keys": {"mask": seen[:, :, :1]},
        "added": {"mask": torch.randn(1, H, T, N, generator=draw, dtype=torch.float64)},
    }
    return found | ({"causal": {"is_causal": True}} if N == T else {})


def values_and_gradients(y: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    dy = torch.randn(y.shape, generator=draw, dtype=y.dtype)
    return [y, *torch.autograd.grad(y, tensors, dy)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("limits", [(128, 2**22, 256), (3, 20, 256), (3, 20, 4)])
def test_values_and_gradients_are_those_of_sdpa(
    shape: tuple[int, ...], limits: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block, in many, and with weights that are made again."""
    for name, limit in zip(("QUERIES", "SCORES", "KEPT"), limits, strict=True):
        monkeypatch.setattr(module, name, limit)
    B, H, G, T, N, _ = shape
    for options in masks(B, H, T, N).values():
        q, k, v = operands(*shape)
        mask, is_causal = options.get("mask"), options.get("is_causal", False)
        wanted = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=0.3, enable_gqa=G != H
        ).transpose(1, 2)
        ours = dense_attention(q, k, v, 0.3, **options)
        for a, b in zip(
            values_and_gradients(ours, [q, k, v]),
            values_and_gradients(wanted, [q, k, v]),
            strict=True,
        ):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("kept", [256, 4])
def test_dropout_drops_weights_and_its_gradient_follows(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", kept)
    B, H, G, T, N, _ = shape = (2, 4, 2, 6, 6, 3)
    q, k, v = operands(*shape)
    torch.manual_seed(4)
    ours = dense_attention(q, k, v, 0.3, dropout=0.4)
    torch.manual_seed(4)
    drawn = keep_mask(torch.Size((B * G, H // G * T, N)), 0.4, q.device).view(B, H, T, N)
    assert 0.3 < -drawn.double().mean() < 0.9
    K, V = (t.repeat_interleave(H // G, 1) for t in (k, v))
    A = torch.softmax(0.3 * q @ K.transpose(-1, -2), -1)
    wanted = ((A * -drawn / 0.6) @ V).transpose(1, 2)
    for a, b in zip(
        values_and_gradients(ours, [q, k, v]),
        values_and_gradients(wanted, [q, k, v]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_a_query_that_sees_nothing_stays_finite() -> None:
    q, k, v = operands(1, 2, 2, 3, 3, 2)
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = False
    for dtype in (torch.float64, torch.bfloat16):
        y = dense_attention(*(t.to(dtype) for t in (q, k, v)), 0.3, mask)
        torch.testing.assert_close(y[0, 1], v.mean(2)[0].to(dtype), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("is_causal", [True, False])
def test_blocks_cover_all_rows_and_queries_once(
    is_causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORES", 100 * 130 * 2)
    seen = torch.zeros(5, 130, dtype=torch.int)
    for block in blocks(5, 2, 130, 130, is_causal):
        seen[block.rows, block.queries] += 1
        assert block.keys.stop == (block.queries.stop if is_causal else 130)
    assert torch.equal(seen, torch.ones_like(seen))


def eager(q: Tensor, k: Tensor, v: Tensor, scale: float, added: Tensor) -> Tensor:
    """Attention as transformers' models write it out."""
    A = torch.softmax(q @ k.transpose(-1, -2) * scale + added, -1, dtype=torch.float32)
    return (A.to(q.dtype) @ v).transpose(1, 2)


def test_bfloat16_errs_no_more_than_attention_that_is_written_out() -> None:
    for options in masks(3, 4, 40, 40).values():
        q, k, v = operands(3, 4, 4, 40, 40, 16)
        mask, is_causal = options.get("mask"), options.get("is_causal", False)
        exact = values_and_gradients(dense_attention(q, k, v, 0.25, **options), [q, k, v])
        half = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
        ours = dense_attention(half[0], half[1], half[2], 0.25, mask, is_causal)
        added = torch.zeros(40, 40) if mask is None else mask
        if added.dtype == torch.bool:
            added = torch.zeros(added.shape).masked_fill(~added, float("-inf"))
        if is_causal:
            added = torch.full((40, 40), float("-inf")).triu(1)
        plain = eager(half[0], half[1], half[2], 0.25, added.bfloat16())
        for a, b, c in zip(
            values_and_gradients(ours, half),
            values_and_gradients(plain, half),
            exact,
            strict=True,
        ):
            assert (a.double() - c).norm() <= 1.1 * (b.double() - c).norm()


def test_it_is_taken_on_the_cpu_where_it_is_faster() -> None:
    q = torch.ones(1, 1, 2, 2)
    assert is_dense(q.bfloat16(), 0.0, is_causal=False)
    assert is_dense(q, 0.1, is_causal=False)
    assert is_dense(q, 0.0, is_causal=True)
    assert not is_dense(q, 0.0, is_causal=False)
    assert not is_dense(q.to("meta"), 0.1, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_dense(q, 0.0, is_causal=False)
    with choice.using("reference", torch.device("cpu")):
        assert not is_dense(q, 0.1, is_causal=True)
