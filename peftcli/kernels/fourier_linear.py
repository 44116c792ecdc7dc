"""y = (W + dW) x + b with dW = s Re(ifft2(F)), where F is zero but for `c` at flat positions.

The gradient of c is s / (O I) Re(fft2(G)) at the positions, for the gradient G of dW. Since dW and
G are real, half of each spectrum says all: a coefficient at (r, q) makes the same wave as one at
(-r, -q), and all are read and written where the column q is at most I / 2. That takes half of the
time and memory of the whole spectra. The transform runs in at least float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftcli.kernels.choice import is_reference
from peftcli.kernels.dense_linear import beside, dense_linear
from peftcli.kernels.sparse_linear import spread

Shape = tuple[int, int]


def fourier_weight(c: Tensor, positions: Tensor, shape: Shape, scale: float) -> Tensor:
    """s Re(ifft2(F)), (O, I) = `shape`; c (n,) at the flat `positions` (n,) of F."""
    d_out, d_in = shape
    folded, is_edge = _folded(positions, shape)
    values = torch.where(is_edge, scale * c, scale / 2 * c)  # the mirrored half is the other half
    dtype = torch.promote_types(c.dtype, torch.complex64)
    half = torch.zeros(d_out * (d_in // 2 + 1), dtype=dtype, device=c.device)
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
    """The equation in plain torch, by the whole spectrum."""
    dW = scale * torch.fft.ifft2(spread(positions, c, shape)).real
    return beside(x, W, b, dW)


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
    if is_reference():
        return fourier_linear_ref(x, W, b, c, positions, shape, scale)
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
