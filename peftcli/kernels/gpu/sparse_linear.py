"""Single entries of dy' x, without the dense product."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftcli.kernels.gpu.products import launch


def entries(dy_OT: Tensor, x_IT: Tensor, indices: Tensor) -> Tensor:
    """(dy x')[o, i] at the flat positions `indices` (K,) of (O, I), in float32. dy (O, T) and x (I,
    T), contiguous -> (K,).
    """
    T, K = x_IT.shape[1], len(indices)
    found = torch.empty(K, dtype=torch.float32, device=x_IT.device)
    BK, BT = 32, min(128, triton.next_power_of_2(T))
    grid = (triton.cdiv(K, BK),)
    launch(_entries, grid, dy_OT, x_IT, indices, found, len(x_IT), T, K, BK=BK, BT=BT)
    return found


@triton.jit
def _entries(DY, X, AT, FOUND, d_in, T, K, BK: tl.constexpr, BT: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    flat = tl.load(AT + k, k < K, 0).to(tl.int64)
    row, column = (flat // d_in)[:, None] * T, (flat % d_in)[:, None] * T
    total = tl.zeros((BK,), tl.float32)
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)
        inside = (k < K)[:, None] & (t < T)
        dy = tl.load(DY + row + t, inside, 0.0).to(tl.float32)
        x = tl.load(X + column + t, inside, 0.0).to(tl.float32)
        total += tl.sum(dy * x, 1)
    tl.store(FOUND + k, total, k < K)
