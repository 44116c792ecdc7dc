"""y = W x + b + s B A x for a frozen W, as one autograd node that saves little.

Beside `x`, which the frozen product's neighbours keep alive anyway, only the (T, R) activations A x
are saved; the low-rank product is added into the frozen one in place. The masters A and B may be
float32 while the products run in the type of `x` (or autocast's): they are cast on the way in, and
their gradients leave in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def lora_linear_ref(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """The equation in plain torch. x (..., I), W (O, I), b (O,), A (R, I), B (O, R) -> (..., O)."""
    return F.linear(x, W, b) + scale * F.linear(F.linear(x, A), B)


def lora_linear(
    x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """W x + b + scale * B A x. x (..., I), W (O, I) frozen, b (O,) frozen, A (R, I), B (O, R) ->
    (..., O).
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return _LoRALinear.apply(
            x.to(dtype), W.to(dtype), None if b is None else b.to(dtype), A, B, scale
        )


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        h_TR = x_TI @ A.to(x.dtype).T
        y_TO = F.linear(x_TI, W, b)
        y_TO.addmm_(h_TR, B.to(x.dtype).T, alpha=scale)
        ctx.save_for_backward(x_TI, h_TR, W, A, B)
        ctx.scale, ctx.shape = scale, x.shape
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x_TI, h_TR, W, A, B = ctx.saved_tensors
        dy_TO = dy.reshape(-1, dy.shape[-1])
        u_TR = (dy_TO @ B.to(dy.dtype)).mul_(ctx.scale)
        dx = dA = dB = None
        if ctx.needs_input_grad[3]:
            dA = (u_TR.T @ x_TI).to(A.dtype)
        if ctx.needs_input_grad[4]:
            dB = (dy_TO.T @ h_TR).to(B.dtype).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            dx = (dy_TO @ W).addmm_(u_TR, A.to(dy.dtype)).view(ctx.shape)
        return dx, None, None, dA, dB, None
