"""Dropout on the CPU from 16 random bits a number: four numbers share one draw of the generator.

Numbers are kept with the multiple of 2^-16 that is nearest to 1 - p, and divided by exactly that,
so that their mean stays. torch draws a number for each: 34 ms for a mask of 1024 x 1536, here 16
(one core, 2026-11).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference

LEVELS = 2**16


def keep_mask(shape: torch.Size, p: float, device: torch.device) -> tuple[Tensor, float]:
    """What is kept, as booleans, and the gain 1 / keep of it."""
    if device.type == "cuda":
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - p), 1 / (1 - p)
    dropped, size = round(p * LEVELS), shape.numel()
    bits = torch.randint(-(2**63), 2**63 - 1, (-(-size // 4),), device=device)
    numbers = bits.view(torch.int16)[:size].view(shape)  # -2^15 .. 2^15 - 1
    return numbers >= dropped - LEVELS // 2, LEVELS / (LEVELS - dropped)


def dropout(x: Tensor, p: float) -> Tensor:
    """x with numbers set to 0 with probability p, and the others divided by 1 - p."""
    if not p or x.is_cuda or is_reference():
        return F.dropout(x, p)
    mask, gain = keep_mask(x.shape, p, x.device)
    return _Dropout.apply(x, mask, gain)  # pyright: ignore[reportReturnType]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, gain: float) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.gain = gain
        return torch.where(mask, x, 0.0).mul_(gain)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, grad_outputs[0], 0.0).mul_(ctx.gain), None, None
