"""x S over the last axis, S Sylvester's matrix: butterflies of a row that stays in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftcli.kernels.gpu.products import launch


def walsh(x: Tensor) -> Tensor:
    """x S, not normalised, summed in float32. x (M, D), contiguous, D a power of two -> (M, D)."""
    M, D = x.shape
    y = torch.empty_like(x)
    rows = max(1, min(1024 // D, triton.next_power_of_2(M)))
    grid = (triton.cdiv(M, rows),)
    launch(_walsh, grid, x, y, M, D=D, ROWS=rows, LEVELS=D.bit_length() - 1)
    return y


@triton.jit
def _walsh(X, Y, M, D: tl.constexpr, ROWS: tl.constexpr, LEVELS: tl.constexpr):
    m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = m[:, None] * D + tl.arange(0, D)
    x = tl.load(X + at, m[:, None] < M, 0.0).to(tl.float32)
    for level in tl.static_range(LEVELS):  # pyright: ignore[reportGeneralTypeIssues]
        h: tl.constexpr = 1 << level
        pairs = tl.permute(tl.reshape(x, (ROWS * D // (2 * h), 2, h)), (0, 2, 1))
        a, b = tl.split(pairs)
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, D))
    tl.store(Y + at, x, m[:, None] < M)
