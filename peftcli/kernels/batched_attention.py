"""Causal attention of a packed row as a few batches of matrix products, for bfloat16 on the CPU.

There torch's own kernel has a slow backward pass: for 16 segments of 50 tokens it takes eight times
as long as its products (9 heads over 3 groups of width 64, AVX512-BF16, 2026-11). Here segments
behind the same prefix and of similar lengths are padded to the longest and computed together, in
pieces whose scores stay in the cache. The weights are made again for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 512  # tokens of a segment; torch's kernel is as fast from there on
ALIKE = 0.75  # of the longest of a batch, at least, is each of its segments
SCORES = 2**20  # of a batch, at most

_is_off = False


class Batch(NamedTuple):
    """Segments that are computed together, by the rows of the padded queries and keys.

    `queries` (n, r, L) count through r heads of T + 1 rows, the last of which is padding; `keys`
    (n, S + L) through P rows of keys before the row, its T and the padding. The first S are the
    same for all: the P, and the prefix [start, stop).
    """

    queries: Tensor
    keys: Tensor
    prefix: tuple[int, int]

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """n, r, L and S."""
        n, r, L = self.queries.shape
        return n, r, L, self.keys.shape[1] - L


@contextmanager
def one_by_one() -> Iterator[None]:
    """Every segment by itself for the length of the block, rounded as a row that stands alone."""
    global _is_off
    was, _is_off = _is_off, True
    try:
        yield
    finally:
        _is_off = was


def is_batched(q: Tensor, segments: Sequence[Any], dropout: float) -> bool:
    """Whether this is the faster form for q (1, H, T, D)."""
    halved = q.is_cpu and q.dtype == torch.bfloat16 and not _is_off
    return halved and not dropout and all(s.stop - s.start <= LONGEST for s in segments)


def batched_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[Any],
    scale: float,
    before: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """q (1, H, T, D), k and v (1, G, T, D), `before` (1, G, P, D) -> (1, H, T, D)."""
    if before is not None:
        k, v = (torch.cat(t, 2) for t in zip(before, (k, v), strict=True))
    P = k.shape[2] - q.shape[2]
    batches = plan(tuple(segments), q.shape[1] // k.shape[1], k.shape[1], P)
    return _Batched.apply(q, k, v, batches, scale)


@lru_cache(maxsize=64)
def plan(segments: tuple[Any, ...], r: int, G: int, P: int) -> tuple[Batch, ...]:
    """The batches of a row's segments, for r heads in each of G groups."""
    T, made = segments[-1].stop, []
    order = sorted(segments, key=lambda s: (s.prefix_start, s.prefix_stop, s.start - s.stop))
    for prefix, alike in groupby(order, lambda s: (s.prefix_start, s.prefix_stop)):
        seen = [*range(P), *range(P + prefix[0], P + prefix[1])]
        for part, L in _parts(list(alike), len(seen), r * G):
            rows = torch.full((len(part), L), T)
            for i, s in enumerate(part):
                rows[i, : s.stop - s.start] = torch.arange(s.start, s.stop)
            queries = rows[:, None] + (T + 1) * torch.arange(r)[:, None]
            keys = torch.cat(
                [torch.tensor(seen, dtype=torch.long).expand(len(part), -1), rows + P], 1
            )
            made.append(Batch(queries, keys, prefix))
    return tuple(made)


def _parts(segments: list[Any], S: int, heads: int) -> Iterator[tuple[list[Any], int]]:
    """The segments, the longest first, in parts with the length of their longest."""
    while segments:
        L = segments[0].stop - segments[0].start
        most = max(1, SCORES // (heads * L * (S + L)))
        n = sum(s.stop - s.start >= ALIKE * L for s in segments[:most])
        yield segments[:n], L
        segments = segments[n:]


class _Batched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, batches: tuple[Batch, ...], scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.batches, ctx.scale = batches, scale
        (_, H, T, D), G = q.shape, k.shape[1]
        padded = [_padded(t, G) for t in (q * scale, k, v)]
        out = q.new_empty(G, H // G * (T + 1), D)
        for batch in batches:
            Q, K, V = _taken(padded, batch)
            y = torch.bmm(_weights(Q, K, batch), V)
            out.index_copy_(1, batch.queries.flatten(), y.view(G, -1, D))
        return out.view(1, H, T + 1, D)[:, :, :T]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        (_, H, T, D), (_, G, N, _) = q.shape, k.shape
        padded = [_padded(t, G) for t in (q * ctx.scale, k, v)]
        dy_padded = _padded(dy, G)
        dq = q.new_empty(G, H // G * (T + 1), D)
        dk, dv = (k.new_zeros(G, N + 1, D) for _ in range(2))
        shared = []
        for batch in ctx.batches:
            n, _, L, S = batch.sizes
            Q, K, V = _taken(padded, batch)
            dY = dy_padded.index_select(1, batch.queries.flatten()).view(Q.shape)
            A = _weights(Q, K, batch)
            dA = torch.bmm(dY, V.transpose(1, 2))
            dS = torch.ops.aten._softmax_backward_data(dA, A, -1, A.dtype)
            dq.index_copy_(1, batch.queries.flatten(), torch.bmm(dS, K).view(G, -1, D))
            own = batch.keys[:, S:].flatten()
            for total, left, right in ((dk, dS, Q), (dv, A, dY)):
                made = torch.bmm(left.transpose(1, 2), right).view(G, n, S + L, D)
                total.index_copy_(1, own, made[:, :, S:].reshape(G, -1, D))
                if S:
                    shared.append((total, batch.prefix, made[:, :, :S].sum(1)))
        P = N - T
        for total, (start, stop), made in shared:
            total[:, :P] += made[:, :P]
            total[:, P + start : P + stop] += made[:, P:]
        dq = dq.view(1, H, T + 1, D)[:, :, :T] * ctx.scale
        return dq, dk[None, :, :N], dv[None, :, :N], None, None


def _padded(t: Tensor, G: int) -> Tensor:
    """(1, H, T, D) with a row of zeros behind each head, as (G, H / G * (T + 1), D)."""
    return F.pad(t, (0, 0, 0, 1)).view(G, -1, t.shape[-1])


def _taken(padded: list[Tensor], batch: Batch) -> Iterator[Tensor]:
    """The queries (G n, r L, D) of a batch, its keys and its values (G n, S + L, D)."""
    n, D = len(batch.keys), padded[0].shape[-1]
    G = len(padded[0])
    for t, rows in zip(padded, (batch.queries, batch.keys, batch.keys), strict=True):
        yield t.index_select(1, rows.flatten()).view(G * n, -1, D)


def _weights(Q: Tensor, K: Tensor, batch: Batch) -> Tensor:
    """softmax(Q K^T) under the batch's mask, (G n, r L, S + L)."""
    _, r, L, S = batch.sizes
    scores = torch.bmm(Q, K.transpose(1, 2))
    scores.view(-1, r, L, S + L).add_(_unseen(S, L, Q.dtype))
    return torch.softmax(scores, -1)


@lru_cache(maxsize=256)
def _unseen(S: int, L: int, dtype: torch.dtype) -> Tensor:
    """(L, S + L): -inf for the tokens behind each, of which the first S are before all."""
    return torch.full((L, S + L), float("-inf"), dtype=dtype).triu(S + 1)
