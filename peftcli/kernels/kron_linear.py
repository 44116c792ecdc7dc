"""y = W x + b + s (W1 (x) W2) x for a frozen W, (x) the Kronecker product, as one autograd node.

W1 (a, c), W2 (p, e), O = a p, I = c e; W2 may be a product W2a (p, R) W2b (R, e). With x as a
matrix (c, e) the change of the output is the matrix W1 x W2' (a, p), so the (O, I) product is never
made: with T tokens and factors it is T R (I + a c + O) multiplications. The last product is added
into the frozen one in place, and beside `x` only x W2b' (T, c, R) is saved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference
from peftcli.kernels.dense_linear import beside
from peftcli.kernels.precision import cast, product_dtype


class Kron(NamedTuple):
    """W1 (a, c) and W2 = W2a W2b, (p, R) and (R, e); or W2 = W2b alone, (p, e)."""

    W1: Tensor
    W2a: Tensor | None
    W2b: Tensor


def kron_linear_ref(x: Tensor, W: Tensor, b: Tensor | None, k: Kron, scale: float) -> Tensor:
    """The equation in plain torch. x (..., I), W (O, I), b (O,) -> (..., O)."""
    W2 = k.W2b if k.W2a is None else k.W2a @ k.W2b
    return beside(x, W, b, scale * torch.kron(k.W1, W2))


def kron_linear(x: Tensor, W: Tensor, b: Tensor | None, k: Kron, scale: float) -> Tensor:
    """W x + b + s (W1 (x) W2) x. x (..., I), W (O, I) and b (O,) frozen -> (..., O)."""
    if is_reference():
        return kron_linear_ref(x, W, b, k, scale)
    x, W, b = cast(product_dtype(x), x, W, b)
    with torch.autocast(x.device.type, enabled=False):
        return _KronLinear.apply(x, W, b, scale, *k)  # pyright: ignore[reportReturnType]


class _KronLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        scale: float,
        W1: Tensor,
        W2a: Tensor | None,
        W2b: Tensor,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        x_Tce = x_TI.view(-1, W1.shape[1], W2b.shape[1])
        g_TcR = x_Tce if W2a is None else x_Tce @ W2b.to(x.dtype).T
        last = (W2b if W2a is None else W2a).to(x.dtype)  # (p, R)
        h_TaR = W1.to(x.dtype) @ g_TcR
        y_TO = F.linear(x_TI, W, b)
        y_TO.view(-1, len(last)).addmm_(h_TaR.flatten(0, 1), last.T, alpha=scale)
        ctx.save_for_backward(x_TI, W, W1, W2a, W2b, None if W2a is None else g_TcR)
        ctx.scale, ctx.shape = scale, x.shape
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x_TI, W, W1, W2a, W2b, g_TcR = ctx.saved_tensors
        dtype = x_TI.dtype
        x_Tce = x_TI.view(-1, W1.shape[1], W2b.shape[1])
        g_TcR = x_Tce if g_TcR is None else g_TcR
        first, last = W1.to(dtype), (W2b if W2a is None else W2a).to(dtype)
        dy_TO = dy.reshape(len(x_TI), -1)
        dy_p = dy_TO.reshape(-1, len(last))  # (T a, p)
        h_TaR = first @ g_TcR
        dlast = (dy_p.T @ h_TaR.flatten(0, 1)).mul_(ctx.scale)  # (p, R)
        dh_TaR = (dy_p @ last).mul_(ctx.scale).view(h_TaR.shape)
        dW1 = torch.einsum("tar,tcr->ac", dh_TaR, g_TcR)
        dg_TcR = first.T @ dh_TaR
        dW2b = dx = None
        if W2a is not None:
            dW2b = (dg_TcR.flatten(0, 1).T @ x_Tce.flatten(0, 1)).to(W2b.dtype)
        if ctx.needs_input_grad[0]:
            dx = dy_TO @ W
            if W2a is None:
                dx.view(dg_TcR.shape).add_(dg_TcR)
            else:
                dx.view(-1, W2b.shape[1]).addmm_(dg_TcR.flatten(0, 1), W2b.to(dtype))
            dx = dx.view(ctx.shape)
        dlast, dW1 = dlast.to(W2b.dtype), dW1.to(W1.dtype)
        return dx, None, None, None, dW1, *((None, dlast) if W2a is None else (dlast, dW2b))
