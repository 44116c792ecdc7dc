"""y = (W + dW) x + b for a frozen W and a dW that is dense but made of few parameters, as one
autograd node that saves `x` and the parameters alone.

The node makes dW anew in the backward pass, and the one dense gradient G = dy' x goes back through
dW's own equation: with T tokens, forward, dx and G cost 6 T O I, as for a weight that trains, and
beside W no more than one (O, I) matrix is held, for the length of one pass. A float32 dW is added
to W where the product runs in float32, too; where it runs in less, rounding the sum would drop what
is smaller than W's last bit, so dW has a product of its own.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference
from peftcli.kernels.precision import cast, product_dtype


class Change(Protocol):
    """dW (O, I) as a function of tensors `parts`, and of W, which is constant."""

    def make(self, W: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
        """dW, in the parts' precision and in memory of its own."""
        ...

    def pull(
        self, G: Tensor, W: Tensor | None, parts: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of `parts` from G (O, I), that of dW, which may be overwritten."""
        ...


def dense_linear_ref(
    x: Tensor, W: Tensor | None, b: Tensor | None, change: Change, *parts: Tensor
) -> Tensor:
    """The equation in plain torch: x (..., I), W (O, I), b (O,) -> (..., O)."""
    return beside(x, W, b, change.make(W, parts))


def beside(x: Tensor, W: Tensor | None, b: Tensor | None, dW: Tensor) -> Tensor:
    """W x + b + dW x in the type of x."""
    x, W, b, dW = cast(product_dtype(x), x, W, b, dW)
    return F.linear(x, dW, b) if W is None else F.linear(x, W, b) + F.linear(x, dW)


def dense_linear(
    x: Tensor, W: Tensor | None, b: Tensor | None, change: Change, *parts: Tensor
) -> Tensor:
    """(W + dW) x + b. x (..., I), W (O, I) and b (O,) frozen -> (..., O); without W, dW x + b."""
    if is_reference():
        return dense_linear_ref(x, W, b, change, *parts)
    x, W, b = cast(product_dtype(x), x, W, b)
    with torch.autocast(x.device.type, enabled=False):
        return _DenseLinear.apply(x, W, b, change, *parts)


class _DenseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor | None, b: Tensor | None, change: Change, *parts: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, W, *parts)
        ctx.change = change
        x_TI, dW = x.reshape(-1, x.shape[-1]), change.make(W, parts)
        if W is None or dW.dtype == x.dtype:
            y_TO = F.linear(x_TI, _sum(dW, W, x.dtype), b)
        else:
            y_TO = F.linear(x_TI, W, b).addmm_(x_TI, dW.to(x.dtype).T)
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        with torch.autocast(dy.device.type, enabled=False):
            return _pulled_back(ctx, dy)


def _pulled_back(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, W, *rest = ctx.saved_tensors
    parts, dx = tuple(rest), None
    dy_TO, x_TI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    if ctx.needs_input_grad[0]:
        dW = ctx.change.make(W, parts)
        if W is None or dW.dtype == dy.dtype:
            dx = dy_TO @ _sum(dW, W, dy.dtype)
        else:
            dx = (dy_TO @ W).addmm_(dy_TO, dW.to(dy.dtype))
        del dW  # before G takes as much
        dx = dx.view(x.shape)
    grads = (None,) * len(parts)
    if any(ctx.needs_input_grad[4:]):
        G = (dy_TO.T @ x_TI).to(parts[0].dtype)
        grads = ctx.change.pull(G, W, parts)
    return dx, None, None, None, *grads


def _sum(dW: Tensor, W: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W + dW in dW's memory."""
    return dW.to(dtype) if W is None else dW.add_(W)
