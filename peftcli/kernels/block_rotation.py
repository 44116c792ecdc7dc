"""z = x blockdiag(R_1 ... R_n): the features of x turned block by block, R (n, b, b).

One batched product of strided views, forward and backward: nothing as large as x is copied. Blocks
of a few numbers leave matrix units idle, so neighbours are joined first, to up to `JOINED`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference, takes_triton
from peftcli.kernels.precision import cast, product_dtype

# 1024 tokens by 576 features, float32, one core, 2026-11: blocks of 4, 8, 32, 64 take 2.5, 1.4, 0.5
# and 0.8 ms.
JOINED = 32


def block_rotation_ref(x: Tensor, R: Tensor) -> Tensor:
    """The equation with the (I, I) matrix. x (..., I), R (n, b, b), n b = I -> (..., I)."""
    return x @ torch.block_diag(*R)


def block_rotation(x: Tensor, R: Tensor) -> Tensor:
    """x blockdiag(R). x (..., I), R (n, b, b), n b = I -> (..., I)."""
    x, R = cast(product_dtype(x), x, R)
    if is_reference():
        return block_rotation_ref(x, R)
    n, b = R.shape[:2]
    size = max(g for g in range(1, n + 1) if n % g == 0 and (g == 1 or g * b <= JOINED))
    z: Any = _BlockRotation.apply(x.reshape(-1, n // size, size * b), R, size)
    return z.view(x.shape)


class _BlockRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TnD: Tensor, R: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x_TnD, R)
        ctx.size = size
        return _turned(x_TnD, _join(R, size))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dz_TnD,) = grad_outputs
        x_TnD, R = ctx.saved_tensors
        dx = dR = None
        if ctx.needs_input_grad[0]:
            dx = _turned(dz_TnD, _join(R, ctx.size).mT)
        if ctx.needs_input_grad[1]:
            dR = _part(_outer(x_TnD, dz_TnD), R.shape[-1]).to(R.dtype)
        return dx, dR, None


def _turned(x_TnD: Tensor, J: Tensor) -> Tensor:
    """Every block of x times its own of J (n, D, D), in the layout of x."""
    if takes_triton("block_rotation", x_TnD, J, side=J.shape[-1]):
        from peftcli.kernels.gpu import block_rotation as gpu

        return gpu.turned(x_TnD.contiguous(), J)
    z_TnD = x_TnD.new_empty(x_TnD.shape)
    torch.bmm(x_TnD.transpose(0, 1), J, out=z_TnD.transpose(0, 1))
    return z_TnD


def _outer(x_TnD: Tensor, dz_TnD: Tensor) -> Tensor:
    """sum_t x_t' dz_t for every block, (n, D, D)."""
    if takes_triton("block_rotation", x_TnD, dz_TnD, side=x_TnD.shape[-1]):
        from peftcli.kernels.gpu import block_rotation as gpu

        return gpu.outer(x_TnD.contiguous(), dz_TnD.contiguous())
    return x_TnD.permute(1, 2, 0) @ dz_TnD.transpose(0, 1)


def _join(R: Tensor, size: int) -> Tensor:
    """(n, b, b) -> (n / size, size b, size b), `size` neighbours on the diagonal of each."""
    if size == 1:
        return R
    n, b, _ = R.shape
    inside = torch.diag_embed(R.view(-1, size, b, b).permute(0, 2, 3, 1))  # (n/s, b, b, s, s)
    return inside.permute(0, 3, 1, 4, 2).reshape(n // size, size * b, size * b)


def _part(J: Tensor, b: int) -> Tensor:
    """The blocks (n, b, b) on the diagonals of J (n / size, size b, size b)."""
    size = J.shape[-1] // b
    inside = J.view(-1, size, b, size, b).diagonal(dim1=1, dim2=3)  # (n/s, b, b, s)
    return inside.permute(0, 3, 1, 2).reshape(-1, b, b)
