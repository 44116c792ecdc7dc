"""Attention of a batch of rows of one length on the CPU, as batched matrix products.

Blocks of queries, and of rows where there are many scores, are computed one after the other; of
more than 256 keys the weights are made again for the backward pass. Forward and backward take 0.1
to 0.4 of the time of torch's own kernel in bfloat16, 0.7 to 1.0 in float32 where queries see no
later key, and 0.6 with dropout, for which torch has no kernel (two cores with AVX512-BF16,
2026-11). Float32 without either is left to torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference
from peftcli.kernels.dropout import keep, keep_mask
from peftcli.kernels.precision import cast, own_dtype, product_dtype

QUERIES = 128  # of a row at a time, so that few keys are multiplied that no query sees
SCORES = 2**22  # of a block, at most, unless a single row has more
KEPT = 256  # keys, at most, whose weights are kept for the backward pass


def is_dense(q: Tensor, dropout: float, is_causal: bool) -> bool:
    """Whether this is the faster form for q (B, H, T, D)."""
    if not q.is_cpu or is_reference():
        return False
    return is_causal or dropout > 0 or product_dtype(q) == torch.bfloat16


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k' + mask) v. q (B, H, T, D), k and v (B, G, N, D) with H a multiple of G,
    `mask` (1 or B, 1 or H, 1 or T, N) of True for what is seen, or of what is added, which gets no
    gradient; causal for N = T -> (B, T, H, D).
    """
    q, k, v = cast(product_dtype(q), q, k, v)
    if mask is not None:
        if mask.dtype == torch.bool:  # what sees nothing sees all alike
            least = torch.finfo(q.dtype).min
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, least)
        mask = mask.expand(-1, -1, q.shape[2], -1)
    with own_dtype(q):
        return _DenseAttention.apply(q, k, v, mask, scale, is_causal, dropout)


class Block(NamedTuple):
    """Some rows, some of their queries, and the keys that these see."""

    rows: slice
    queries: slice
    keys: slice


def blocks(B: int, H: int, T: int, N: int, is_causal: bool) -> Iterator[Block]:
    """The blocks of a batch, each with at most `SCORES` where that is possible; those that see all
    keys come first.
    """
    L = -(-T // -(-T // QUERIES))  # all nearly alike
    for first in reversed(range(0, T, L)):
        stop = min(first + L, T)
        keys = stop if is_causal else N
        n = max(1, SCORES // (H * (stop - first) * keys))
        for row in range(0, B, n):
            yield Block(slice(row, min(row + n, B)), slice(first, stop), slice(keys))


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        is_causal: bool,
        dropout: float,
    ) -> Tensor:
        (B, H, T, D), (G, N) = q.shape, k.shape[1:3]
        y = q.new_empty(B, T, H, D)
        weights, drawn = [], []
        for block in blocks(B, H, T, N, is_causal):
            Q, K, V = _taken(q, k, v, block)
            A = _weights(Q, K, mask, block, scale, is_causal)
            if N <= KEPT:
                weights.append(A)
            if dropout:
                drawn.append(keep_mask(A.shape, dropout, A.device))
                A = keep(A, drawn[-1])
            Y = torch.bmm(A, V)
            if dropout:
                Y.mul_(1 / (1 - dropout))
            _heads_last(y, block, G).copy_(Y.view(-1, G, H // G, _len(block.queries), D))
        ctx.save_for_backward(q, k, v, mask, *weights, *drawn)
        ctx.scale, ctx.is_causal, ctx.dropout = scale, is_causal, dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, mask, *saved = ctx.saved_tensors
        (B, H, T, D), (G, N) = q.shape, k.shape[1:3]
        plan = list(blocks(B, H, T, N, ctx.is_causal))
        weights, drawn = iter(saved), iter(saved[-len(plan) :])
        gain = 1 / (1 - ctx.dropout)
        dq, dk, dv = q.new_empty(B, T, H, D), torch.empty_like(k), torch.empty_like(v)
        for block in plan:
            Q, K, V = _taken(q, k, v, block)
            dY = _heads_last(dy, block, G).reshape(Q.shape)
            if N <= KEPT:
                A = next(weights)
            else:
                A = _weights(Q, K, mask, block, ctx.scale, ctx.is_causal)
            seen, dA = A, torch.bmm(dY, V.transpose(1, 2))
            if ctx.dropout:
                kept = next(drawn)
                seen, dA = keep(A, kept), keep(dA, kept).mul_(gain)
            dS = torch.ops.aten._softmax_backward_data(dA, A, -1, A.dtype)
            dQ = torch.bmm(dS, K).mul_(ctx.scale)
            _heads_last(dq, block, G).copy_(dQ.view(-1, G, H // G, _len(block.queries), D))
            for total, left, right, by in ((dk, dS, Q, ctx.scale), (dv, seen, dY, gain)):
                made = torch.bmm(left.transpose(1, 2), right)
                made, into = made.view(-1, G, *made.shape[1:]), total[block.rows, :, block.keys]
                if block.queries.stop == T:
                    torch.mul(made, by, out=into)
                else:
                    into.add_(made, alpha=by)
        return dq.transpose(1, 2), dk, dv, None, None, None, None


def _len(part: slice) -> int:
    return part.stop - part.start


def _heads_last(t: Tensor, block: Block, G: int) -> Tensor:
    """The block's part of t (B, T, H, D), as (b, G, H / G, L, D)."""
    return t[block.rows, block.queries].unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)


def _taken(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """A block's queries (b G, H / G * L, D), keys and values (b G, N, D)."""
    G, D = k.shape[1], q.shape[-1]
    Q = q[block.rows, :, block.queries]
    K, V = (t[block.rows, :, block.keys].reshape(-1, block.keys.stop, D) for t in (k, v))
    return Q.reshape(len(Q) * G, -1, D), K, V


def _weights(
    Q: Tensor, K: Tensor, mask: Tensor | None, block: Block, scale: float, is_causal: bool
) -> Tensor:
    """softmax(scale Q K') under the block's part of the mask, (b G, H / G * L, N)."""
    scores = torch.bmm(Q * scale, K.transpose(1, 2))
    L, b = _len(block.queries), _len(block.rows)
    each_head = scores.view(b, -1, L, scores.shape[-1])
    if is_causal:
        each_head.add_(unseen(L, scores.shape[-1], scores.dtype))
    if mask is not None:
        rows = block.rows if len(mask) > 1 else slice(None)
        each_head.add_(mask[rows, :, block.queries, block.keys])
    return torch.softmax(scores, -1)


@lru_cache(maxsize=32)
def unseen(L: int, K: int, dtype: torch.dtype) -> Tensor:
    """(L, K): -inf for the keys behind each query; the last query sees all."""
    return torch.full((L, K), float("-inf"), dtype=dtype).triu(K - L + 1)
