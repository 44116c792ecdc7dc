"""y = x dW', where dW = s Re(ifft2(F)) and F is zero but for `c` at flat positions, as one autograd
node that saves little.

Beside `x`, only the positions and `c` are saved: dW is made again in the backward pass. The
gradient of c is s / (O I) Re(fft2(G)) at the positions, with G = dy' x. The transform runs in
float32, the products in the type of `x` (or autocast's).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.sparse_linear import spread

Shape = tuple[int, int]


def fourier_weight(c: Tensor, positions: Tensor, shape: Shape, scale: float) -> Tensor:
    """s Re(ifft2(F)), (O, I) = `shape`; c (n,) at the flat `positions` (n,) of F."""
    return torch.fft.ifft2(spread(positions, c, shape)).real * scale


def fourier_linear_ref(
    x: Tensor, c: Tensor, positions: Tensor, shape: Shape, scale: float
) -> Tensor:
    """The equation entry by entry: dW[j, k] = s / (O I) sum_i c_i cos(2 pi (row_i j / O + col_i k /
    I)).
    """
    d_out, d_in = shape
    rows, columns = (positions // d_in).to(c.dtype), (positions % d_in).to(c.dtype)
    j = torch.arange(d_out, device=c.device)[:, None, None] * rows / d_out  # (O, 1, n)
    k = torch.arange(d_in, device=c.device)[None, :, None] * columns / d_in  # (1, I, n)
    waves = torch.cos(2 * torch.pi * (j + k))
    return F.linear(x, scale / (d_out * d_in) * (waves @ c))


def fourier_linear(x: Tensor, c: Tensor, positions: Tensor, shape: Shape, scale: float) -> Tensor:
    """x dW'. x (..., I), c (n,), positions (n,), shape (O, I) -> (..., O)."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _FourierLinear.apply(x.to(dtype), c, positions, shape, scale)


class _FourierLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, c: Tensor, positions: Tensor, shape: Shape, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, c, positions)
        ctx.shape, ctx.scale = shape, scale
        return F.linear(x, fourier_weight(c, positions, shape, scale).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, c, positions = ctx.saved_tensors
        d_out, d_in = ctx.shape
        dx = dc = None
        if ctx.needs_input_grad[0]:
            dx = dy @ fourier_weight(c, positions, ctx.shape, ctx.scale).to(dy.dtype)
        if ctx.needs_input_grad[1]:
            G = (dy.reshape(-1, d_out).T @ x.reshape(-1, d_in)).to(c.dtype)
            dc = torch.fft.fft2(G).real.reshape(-1)[positions] * (ctx.scale / G.numel())
        return dx, dc, None, None, None
