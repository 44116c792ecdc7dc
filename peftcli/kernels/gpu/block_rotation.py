"""z = x blockdiag(R_1 ... R_n), and the gradient of R, each block in one tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftcli.kernels.gpu.products import launch, options, tile


def turned(x_TnD: Tensor, J: Tensor) -> Tensor:
    """Every block of x (T, n, D), contiguous, times its own of J (n, D, D) -> (T, n, D)."""
    T, n, D = x_TnD.shape
    z = torch.empty_like(x_TnD)
    BT = min(64, tile(T))
    grid = (triton.cdiv(T, BT), n)
    launch(_turned, grid, x_TnD, J, z, T, n, D, *J.stride(), BT=BT, BD=tile(D), **options())
    return z


@triton.jit
def _turned(
    X, J, Z, T, n, D, j_n, j_i, j_o,
    BT: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    t, d = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BD)
    block, in_d = tl.program_id(1), d < D
    at, inside = (t[:, None] * n + block) * D + d, (t[:, None] < T) & in_d
    x = tl.load(X + at, inside, 0.0)
    j = tl.load(J + block * j_n + d[:, None] * j_i + d * j_o, in_d[:, None] & in_d, 0.0)
    if UPCAST:
        x, j = x.to(tl.float32), j.to(tl.float32)
    tl.store(Z + at, tl.dot(x, j, input_precision=PRECISION), inside)


def outer(x_TnD: Tensor, dz_TnD: Tensor) -> Tensor:
    """sum_t x_t' dz_t for every block, (n, D, D); both (T, n, D), contiguous."""
    T, n, D = x_TnD.shape
    J = torch.empty(n, D, D, dtype=torch.float32, device=x_TnD.device)
    BT = min(64, tile(T))
    launch(_outer, (n,), x_TnD, dz_TnD, J, T, n, D, BT=BT, BD=tile(D), **options())
    return J


@triton.jit
def _outer(
    X, DZ, J, T, n, D,
    BT: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    in_d = d < D
    j = tl.zeros((BD, BD), tl.float32)
    for start in range(0, T, BT):
        t = start + tl.arange(0, BT)
        at, inside = (t[:, None] * n + block) * D + d, (t[:, None] < T) & in_d
        x, dz = tl.load(X + at, inside, 0.0), tl.load(DZ + at, inside, 0.0)
        if UPCAST:
            x, dz = x.to(tl.float32), dz.to(tl.float32)
        j = tl.dot(tl.trans(x), dz, j, input_precision=PRECISION)
    tl.store(J + (block * D + d[:, None]) * D + d, j, in_d[:, None] & in_d)
