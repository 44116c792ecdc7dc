"""Cross entropy of a linear head, summed over targets, without holding all logits; and of logits.

Blocks of rows go through the head one after the other; a block's logits become its gradient in
place, a few rows at a time, and leave through the head again, so that the forward pass already
holds dL/dh and the backward pass only scales it. With V words, T targets and blocks of R rows the
largest temporary is (R, V) instead of several (T, V); where the head itself trains it is one (T, V)
in the type of the products, for its own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference
from peftcli.kernels.precision import cast, product_dtype

BLOCK_ROWS = 256  # 25 MB of bfloat16 logits at 49,152 words; larger blocks are no faster
CACHED_ROWS = 16  # of a block on the CPU: 3 MB in float32, which stay in its cache


def linear_cross_entropy_ref(h: Tensor, W: Tensor, b: Tensor | None, targets: Tensor) -> Tensor:
    """sum_t -log softmax(W h_t + b)[target_t]. h (T, D), W (V, D), b (V,), targets (T,) -> ()."""
    return F.cross_entropy(F.linear(h, W, b).float(), targets, reduction="sum")


def linear_cross_entropy(h: Tensor, W: Tensor, b: Tensor | None, targets: Tensor) -> Tensor:
    """sum_t -log softmax(W h_t + b)[target_t]. h (T, D), W (V, D), b (V,), targets (T,) -> (),
    float32 or wider. A call without gradients takes the plain way.
    """
    wanted = any(t is not None and t.requires_grad for t in (h, W, b))
    if is_reference() or not (torch.is_grad_enabled() and wanted):
        return linear_cross_entropy_ref(h, W, b, targets)
    h, W, b = cast(product_dtype(h), h, W, b)
    with torch.autocast(h.device.type, enabled=False):
        return _LinearCrossEntropy.apply(h, W, b, targets)


def cross_entropy(z: Tensor, targets: Tensor) -> Tensor:
    """sum_t -log softmax(z_t)[target_t] of logits that are there. z (T, V), targets (T,) -> (),
    float32 or wider.
    """
    if is_reference() or not (torch.is_grad_enabled() and z.requires_grad):
        return F.cross_entropy(z.float(), targets, reduction="sum")
    return _CrossEntropy.apply(z, targets)


def _into_gradient(z: Tensor, targets: Tensor) -> Tensor:
    """Write the gradient of the summed loss over the logits z (R, V), a few rows at a time; returns
    the loss.
    """
    wide = torch.promote_types(z.dtype, torch.float32)
    total = torch.zeros((), dtype=wide, device=z.device)
    few = CACHED_ROWS if z.is_cpu else BLOCK_ROWS
    for row, target in zip(z.split(few), targets[:, None].split(few), strict=True):
        log_p = torch.log_softmax(row, 1, dtype=wide)
        total -= log_p.gather(1, target).sum()
        one = torch.ones_like(target, dtype=wide)
        row.copy_(log_p.exp_().scatter_add_(1, target, -one))
    return total


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, targets: Tensor) -> Tensor:
        dz_TV = z.clone()
        total = _into_gradient(dz_TV, targets)
        ctx.save_for_backward(dz_TV)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dz_TV,) = ctx.saved_tensors
        return dz_TV * grad_outputs[0].to(dz_TV.dtype), None


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, W: Tensor, b: Tensor | None, targets: Tensor) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        wants_h, wants_W, wants_b, _ = ctx.needs_input_grad
        keeps = wants_W or wants_b
        dh_TD = torch.empty_like(h) if wants_h else None
        total = torch.zeros((), dtype=wide, device=h.device)
        buffer_RV = h.new_empty(len(h) if keeps else min(BLOCK_ROWS, len(h)), len(W))
        for at in range(0, len(h), BLOCK_ROWS):
            rows = slice(at, at + BLOCK_ROWS)
            z_RV = buffer_RV[rows] if keeps else buffer_RV[: len(h[rows])]
            if b is None:
                torch.mm(h[rows], W.T, out=z_RV)
            else:
                torch.addmm(b, h[rows], W.T, out=z_RV)
            total += _into_gradient(z_RV, targets[rows])
            if dh_TD is not None:
                torch.mm(z_RV, W, out=dh_TD[rows])
        dW_VD = buffer_RV.T @ h if wants_W else None
        db_V = buffer_RV.sum(0) if wants_b else None
        ctx.save_for_backward(dh_TD, dW_VD, db_V)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (g,) = grad_outputs
        return *(t if t is None else t * g.to(t.dtype) for t in ctx.saved_tensors), None
