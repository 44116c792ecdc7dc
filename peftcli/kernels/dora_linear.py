"""y = g * (W x + s B A x) + c for a frozen W, g (O,) along the outputs, as one autograd node.

z = W x + s B A x is kept for g's gradient, sum_t dy z; the products that sum up to it stand in the
memory that z's gradient g dy then takes, and behind that lies the LoRA linear.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference, takes_triton
from peftcli.kernels.lora_linear import lora_linear_ref, product_plus, thin_gradients
from peftcli.kernels.precision import cast, product_dtype


def dora_linear_ref(
    x: Tensor, W: Tensor, c: Tensor | None, A: Tensor, B: Tensor, g: Tensor, scale: float
) -> Tensor:
    """The equation in plain torch. x (..., I), W (O, I), c (O,) or (..., O), A (R, I), B (O, R), g
    (O,) -> (..., O).
    """
    z = lora_linear_ref(x, W, None, A, B, scale)
    c, g = cast(z.dtype, c, g)
    return g * z if c is None else g * z + c


def dora_linear(
    x: Tensor, W: Tensor, c: Tensor | None, A: Tensor, B: Tensor, g: Tensor, scale: float
) -> Tensor:
    """g * (W x + s B A x) + c. x (..., I), W (O, I) frozen, c (O,) frozen or (..., O), A (R, I), B
    (O, R), g (O,) -> (..., O).
    """
    if is_reference():
        return dora_linear_ref(x, W, c, A, B, g, scale)
    x, W, c = cast(product_dtype(x), x, W, c)
    with torch.autocast(x.device.type, enabled=False):
        return _DoRALinear.apply(x, W, c, A, B, g, scale)  # pyright: ignore[reportReturnType]


class _DoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        c: Tensor | None,
        A: Tensor,
        B: Tensor,
        g: Tensor,
        scale: float,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        h_TR = F.linear(x_TI, A.to(x.dtype))
        shift = c if c is None or c.ndim == 1 else c.reshape(len(x_TI), -1)
        y_TO, z_TO = _scaled(x_TI, W, shift, h_TR, B.to(x.dtype), g.to(x.dtype), scale)
        ctx.save_for_backward(x_TI, W, A, B, g, h_TR, z_TO)
        ctx.scale, ctx.shape = scale, x.shape
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x_TI, W, A, B, g, h_TR, z_TO = ctx.saved_tensors
        with torch.autocast(dy.device.type, enabled=False):
            dy_TO = dy.reshape(z_TO.shape)
            products = dy_TO * z_TO
            dg = products.sum(0, dtype=g.dtype)
            dz_TO = torch.mul(dy_TO, g.to(dy.dtype), out=products)
            u_TR, dB = thin_gradients(dz_TO, B, h_TR, ctx.scale)
            dA, dx = (u_TR.T @ x_TI).to(A.dtype), None
            if ctx.needs_input_grad[0]:
                dx = product_plus(dz_TO, W.T, None, u_TR, A.to(dy.dtype).T, 1.0).view(ctx.shape)
        return dx, None, dy if ctx.needs_input_grad[2] else None, dA, dB, dg, None


def _scaled(
    x: Tensor, W: Tensor, c: Tensor | None, h: Tensor, B: Tensor, g: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(g z + c, z), both (T, O)."""
    by_token = c is not None and c.ndim > 1
    if not by_token and takes_triton("dora_linear", x, W, h, B, g, side=h.shape[1]):
        from peftcli.kernels.gpu import lora_linear as gpu

        y, z = gpu.product_plus(x, W, h, B, scale, c, g)
        assert z is not None
        return y, z
    z = product_plus(x, W, None, h, B, scale)
    return (z * g if c is None else torch.addcmul(c, z, g)), z
