"""y_i = W_i x + b_i + s_i B_i A_i x for frozen W_i that read the same x, as one autograd node that
saves little.

Beside `x`, which the frozen products' neighbours keep alive anyway, only the activations A x of all
ranks are saved: the A_i are one product, forward and backward, and every low-rank product is added
into the frozen one in place. Dropout, of x on its way to each A_i, saves one byte a number. The
masters A and B may be float32 while the products run in the type
of `x` (or autocast's): they are cast on the way in, and their gradients leave in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference
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
    dropout: float = 0.0,
) -> Tensor:
    """The equation in plain torch. x (..., I), W (O, I), b (O,), A (R, I), B (O, R) -> (..., O)."""
    x, W, b, A, B = cast(product_dtype(x), x, W, b, A, B)
    return F.linear(x, W, b) + scale * F.linear(F.linear(F.dropout(x, dropout), A), B)


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
    """The outputs (..., O_i) of all branches for one x (..., I); each drops numbers of its own."""
    if is_reference():
        return tuple(lora_linear_ref(x, *branch, dropout) for branch in branches)
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        frozen = [cast(dtype, branch.W, branch.b) for branch in branches]
        masks = [
            torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout)
            for _ in branches
            if dropout
        ]
        return _LoRALinears.apply(
            x.to(dtype),
            [branch.scale for branch in branches],
            1 / (1 - dropout),
            masks,
            *(W for W, _ in frozen),
            *(b for _, b in frozen),
            *(branch.A for branch in branches),
            *(branch.B for branch in branches),
        )


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scales: list[float], gain: float, masks: list[Tensor], *tensors: Any
    ) -> tuple[Tensor, ...]:
        n = len(scales)
        W, b, A, B = (tensors[i * n : i * n + n] for i in range(4))
        x_TI = x.reshape(-1, x.shape[-1])
        masks = [mask.view(x_TI.shape) for mask in masks]
        if masks:
            dropped = [
                (x_TI * mask) @ A_i.to(x.dtype).T for mask, A_i in zip(masks, A, strict=True)
            ]
            h_TR = _side_by_side(dropped).mul_(gain)
        else:
            h_TR = x_TI @ _stacked(A, x.dtype).T
        ranks = [len(A_i) for A_i in A]
        outputs = []
        for W_i, b_i, B_i, h_i, s in zip(W, b, B, h_TR.split(ranks, 1), scales, strict=True):
            y_TO = F.linear(x_TI, W_i, b_i)
            y_TO.addmm_(h_i, B_i.to(x.dtype).T, alpha=s)
            outputs.append(y_TO.view(*x.shape[:-1], -1))
        ctx.save_for_backward(x_TI, h_TR, *masks, *W, *A, *B)
        ctx.scales, ctx.ranks, ctx.shape, ctx.gain = scales, ranks, x.shape, gain
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        n, (x_TI, h_TR, *saved) = len(ctx.scales), ctx.saved_tensors
        masks, saved = saved[: len(saved) - 3 * n], saved[len(saved) - 3 * n :]
        W, A, B = (saved[i * n : i * n + n] for i in range(3))
        wants_A, wants_B = (ctx.needs_input_grad[4 + i * n :][:n] for i in (2, 3))
        dy = [g.reshape(-1, g.shape[-1]) for g in grad_outputs]
        u = [(g @ B_i.to(g.dtype)).mul_(s) for g, B_i, s in zip(dy, B, ctx.scales, strict=True)]
        dx, dA, dB = None, [None] * n, [None] * n
        if any(wants_B):
            h = h_TR.split(ctx.ranks, 1)
            dB = [
                (g.T @ h_i).to(B[0].dtype).mul_(s)
                for g, h_i, s in zip(dy, h, ctx.scales, strict=True)
            ]
        if any(wants_A) and masks:
            dA = [
                (u_i.T @ (x_TI * mask)).to(A[0].dtype).mul_(ctx.gain)
                for u_i, mask in zip(u, masks, strict=True)
            ]
        elif any(wants_A):
            dA = (_side_by_side(u).T @ x_TI).to(A[0].dtype).split(ctx.ranks)
        if ctx.needs_input_grad[0]:
            if masks:
                dx = torch.zeros_like(x_TI)
                for u_i, A_i, mask in zip(u, A, masks, strict=True):
                    dx.addcmul_(u_i @ A_i.to(u_i.dtype), mask.to(u_i.dtype), value=ctx.gain)
            else:
                dx = _side_by_side(u) @ _stacked(A, x_TI.dtype)
            for g, W_i in zip(dy, W, strict=True):
                dx.addmm_(g, W_i)
            dx = dx.view(ctx.shape)
        return dx, None, None, None, *[None] * (2 * n), *dA, *dB


def _stacked(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All A_i (R_i, I) below each other: (R, I)."""
    return A[0].to(dtype) if len(A) == 1 else torch.cat([A_i.to(dtype) for A_i in A])


def _side_by_side(u: list[Tensor]) -> Tensor:
    return u[0] if len(u) == 1 else torch.cat(u, 1)
