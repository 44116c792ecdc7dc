"""y_i = W_i x + b_i + s_i B_i A_i x for frozen W_i that read the same x, as one autograd node that
saves little.

Beside `x`, which the frozen products' neighbours keep alive anyway, only the activations A x of all
ranks are saved: the A_i are one product, forward and backward, and every low-rank product is added
into the frozen one in place. Dropout, of x on its way to the A_i, is the same for all of them, as
in the authors' merged linear, and saves one byte a number. The masters A and B may be float32 while
the products run in the type of `x` (or autocast's): they are cast on the way in, and their
gradients leave in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference, takes_triton
from peftcli.kernels.dropout import keep, keep_mask
from peftcli.kernels.precision import cast, product_dtype


class Branch(NamedTuple):
    """A frozen linear with its factors: W (O, I), b (O,), A (R, I), B (O, R), s."""

    W: Tensor
    b: Tensor | None
    A: Tensor
    B: Tensor
    scale: float


def lora_linear_ref(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    seen: Tensor | None = None,
) -> Tensor:
    """The equation in plain torch. x (..., I), W (O, I), b (O,), A (R, I), B (O, R) -> (..., O);
    `seen` (..., I) is drop(x), where A sees that.
    """
    x, W, b, A, B, seen = cast(product_dtype(x), x, W, b, A, B, seen)
    return F.linear(x, W, b) + scale * F.linear(F.linear(x if seen is None else seen, A), B)


def lora_linear(
    x: Tensor,
    W: Tensor,
    b: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """W x + b + scale * B A drop(x). x (..., I), W (O, I) frozen, b (O,) frozen, A (R, I), B (O, R)
    -> (..., O).
    """
    return lora_linears(x, [Branch(W, b, A, B, scale)], dropout)[0]


def lora_linears(x: Tensor, branches: Sequence[Branch], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """The outputs (..., O_i) of all branches for one x (..., I), of which all drop the same."""
    if is_reference():
        seen = F.dropout(x, dropout) if dropout else None
        return tuple(lora_linear_ref(x, *branch, seen) for branch in branches)
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        frozen = [cast(dtype, branch.W, branch.b) for branch in branches]
        mask = keep_mask(x.shape, dropout, x.device) if dropout else None
        return _LoRALinears.apply(
            x.to(dtype),
            [branch.scale for branch in branches],
            1 / (1 - dropout),
            mask,
            *(W for W, _ in frozen),
            *(b for _, b in frozen),
            *(branch.A for branch in branches),
            *(branch.B for branch in branches),
        )


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: list[float], gain: float, mask: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, ...]:
        n = len(scales)
        W, b, A, B = (tensors[i * n : i * n + n] for i in range(4))
        x_TI = x.reshape(-1, x.shape[-1])
        mask = None if mask is None else mask.view(x_TI.shape)
        h_TR = _seen(x_TI, mask) @ _stacked(A, x.dtype).T
        if mask is not None:
            h_TR.mul_(gain)
        ranks = [len(A_i) for A_i in A]
        outputs = []
        for W_i, b_i, B_i, h_i, s in zip(W, b, B, h_TR.split(ranks, 1), scales, strict=True):
            y_TO = product_plus(x_TI, W_i, b_i, h_i, B_i.to(x.dtype), s)
            outputs.append(y_TO.view(*x.shape[:-1], -1))
        ctx.save_for_backward(x_TI, h_TR, mask, *W, *A, *B)
        ctx.scales, ctx.ranks, ctx.shape, ctx.gain = scales, ranks, x.shape, gain
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        n, (x_TI, h_TR, mask, *saved) = len(ctx.scales), ctx.saved_tensors
        W, A, B = (saved[i * n : i * n + n] for i in range(3))
        wants_A, wants_B = (ctx.needs_input_grad[4 + i * n :][:n] for i in (2, 3))
        dy = [g.reshape(-1, g.shape[-1]) for g in grad_outputs]
        h = h_TR.split(ctx.ranks, 1)
        thin = [thin_gradients(*t) for t in zip(dy, B, h, ctx.scales, wants_B, strict=True)]
        u_TR, dB = _side_by_side([u_i for u_i, _ in thin]), [dB_i for _, dB_i in thin]
        if mask is not None:
            u_TR = u_TR * ctx.gain
        dx, dA = None, [None] * n
        if any(wants_A):
            dA = (u_TR.T @ _seen(x_TI, mask)).to(A[0].dtype).split(ctx.ranks)
        if ctx.needs_input_grad[0]:
            A_RI = _stacked(A, x_TI.dtype)
            if mask is None:
                dx = product_plus(dy[0], W[0].T, None, u_TR, A_RI.T, 1.0)
            else:
                dx = (dy[0] @ W[0]).add_(keep(u_TR @ A_RI, mask))
            for g, W_i in zip(dy[1:], W[1:], strict=True):
                dx.addmm_(g, W_i)
            dx = dx.view(ctx.shape)
        return dx, None, None, None, *[None] * (2 * n), *dA, *dB


def product_plus(
    x: Tensor, W: Tensor, b: Tensor | None, h: Tensor, B: Tensor, scale: float
) -> Tensor:
    """x W' + b + s h B'. x (M, K), W (N, K), b (N,), h (M, R), B (N, R) -> (M, N)."""
    if takes_triton("lora_linear", x, W, h, B, side=h.shape[1]):
        from peftcli.kernels.gpu import lora_linear as gpu

        return gpu.product_plus(x, W, h, B, scale, b)[0]
    return F.linear(x, W, b).addmm_(h, B.T, alpha=scale)


def thin_gradients(
    dy: Tensor, B: Tensor, h: Tensor, scale: float, wants_B: bool = True
) -> tuple[Tensor, Tensor | None]:
    """u = s dy B (M, R), and dB = s dy' h (N, R) in the type of B where it is wanted. dy (M, N), B
    (N, R), h (M, R).
    """
    narrow = B.to(dy.dtype)
    if wants_B and takes_triton("lora_linear", dy, h, side=h.shape[1]):
        from peftcli.kernels.gpu import lora_linear as gpu

        u, dB = gpu.thin_gradients(dy, narrow, h, scale)
        return u, dB.to(B.dtype)
    u = (dy @ narrow).mul_(scale)
    return u, (dy.T @ h).to(B.dtype).mul_(scale) if wants_B else None


def _seen(x: Tensor, mask: Tensor | None) -> Tensor:
    """What the factors see of x, without the gain."""
    return x if mask is None else keep(x, mask)


def _stacked(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All A_i (R_i, I) below each other: (R, I)."""
    return A[0].to(dtype) if len(A) == 1 else torch.cat([A_i.to(dtype) for A_i in A])


def _side_by_side(u: list[Tensor]) -> Tensor:
    return u[0] if len(u) == 1 else torch.cat(u, 1)
