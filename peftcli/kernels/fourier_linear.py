"""y = (W + dW) x + b with dW = s Re(ifft2(F)), where F is zero but for `c` at flat positions.

The gradient of c is s / (O I) Re(fft2(G)) at the positions, for the gradient G of dW. Since dW and
G are real, half of each spectrum says all: a coefficient at (r, q) makes the same wave as one at
(-r, -q), and all are read and written where the column q is at most I / 2. That takes half of the
time and memory of the whole spectra. The transform runs in at least float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcli.kernels.dense_linear import dense_linear

Shape = tuple[int, int]


def fourier_weight(c: Tensor, positions: Tensor, shape: Shape, scale: float) -> Tensor:
    """s Re(ifft2(F)), (O, I) = `shape`; c (n,) at the flat `positions` (n,) of F."""
    d_out, d_in = shape
    folded, is_edge = _folded(positions, shape)
    values = torch.where(is_edge, scale * c, scale / 2 * c)  # the mirrored half is the other half
    half = torch.zeros(d_out * (d_in // 2 + 1), dtype=c.dtype.to_complex(), device=c.device)
    half = half.index_add(0, folded, values.to(half.dtype)).view(d_out, -1)
    return torch.fft.irfft2(half, s=shape)


def fourier_linear_ref(
    x: Tensor,
    W: Tensor | None,
    b: Tensor | None,
    c: Tensor,
    positions: Tensor,
    shape: Shape,
    scale: float,
) -> Tensor:
    """The equation entry by entry: dW[j, k] = s / (O I) sum_i c_i cos(2 pi (row_i j / O + col_i k /
    I)).
    """
    d_out, d_in = shape
    rows, columns = (positions // d_in).to(c.dtype), (positions % d_in).to(c.dtype)
    j = torch.arange(d_out, device=c.device)[:, None, None] * rows / d_out  # (O, 1, n)
    k = torch.arange(d_in, device=c.device)[None, :, None] * columns / d_in  # (1, I, n)
    dW = scale / (d_out * d_in) * (torch.cos(2 * torch.pi * (j + k)) @ c)
    return F.linear(x, dW if W is None else W + dW, b)


def fourier_linear(
    x: Tensor,
    W: Tensor | None,
    b: Tensor | None,
    c: Tensor,
    positions: Tensor,
    shape: Shape,
    scale: float,
) -> Tensor:
    """(W + dW) x + b. x (..., I), W (O, I) and b (O,) frozen, c (n,), positions (n,), shape (O, I)
    -> (..., O); without W, dW x + b.
    """
    return dense_linear(x, W, b, _Waves(shape, scale), c, positions)


class _Waves(NamedTuple):
    """dW of (c, positions)."""

    shape: Shape
    scale: float

    def make(self, W: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
        c, positions = parts
        return fourier_weight(c, positions, self.shape, self.scale)

    def pull(
        self, G: Tensor, W: Tensor | None, parts: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        folded, _ = _folded(parts[1], self.shape)
        return torch.fft.rfft2(G).reshape(-1)[folded].real * (self.scale / G.numel()), None


def _folded(positions: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Flat positions (n,) in the half spectrum (O, I/2 + 1), and which stand in a column that is
    its own mirror image.
    """
    d_out, d_in = shape
    rows, columns = positions // d_in, positions % d_in
    mirrored = columns > d_in // 2
    rows = torch.where(mirrored, (d_out - rows) % d_out, rows)
    columns = torch.where(mirrored, d_in - columns, columns)
    return rows * (d_in // 2 + 1) + columns, (columns == 0) | (2 * columns == d_in)
