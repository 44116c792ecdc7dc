"""Fastfood: random projections without a matrix. Le, Sarlos, Smola, ICML 2013; in the form of
Aghajanyan et al. 2021 (arXiv 2012.13255), of d numbers onto a tensor of D.

    P v = (S G Pi S B v_pad)[:D] / sqrt(D sum(G^2))        L = 2^ceil(log2 D)

S is the Walsh-Hadamard transform (L, L), not normalised, B random signs, Pi a permutation, G normal
numbers. A column of P has norm 1 where D = L, and about 1 elsewhere. What is drawn is held in
memory, 8 bytes a number of the tensor, since drawing it anew would cost more than the transforms.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peftcli.kernels.hadamard import walsh


def power_of_two(n: int) -> int:
    """The smallest power of two from n on."""
    return 1 << (n - 1).bit_length()


class Fastfood(nn.Module):
    """P v = (S G Pi S B v_pad)[:D] / sqrt(D sum(G^2)), (D,), for v (d,).

    Behind v there are zeros, so its transform repeats a short one, of the power of two from d on:
    what Pi takes from it is looked up in that.
    """

    def __init__(self, D: int, d: int, draw: torch.Generator) -> None:
        super().__init__()
        L = power_of_two(D)
        self.D, self.d = D, min(d, L)
        self.B: Tensor
        self.slots: Tensor
        self.G: Tensor
        signs = torch.randint(2, (L,), generator=draw, dtype=torch.int8) * 2 - 1
        order = torch.randperm(L, generator=draw, dtype=torch.int32)  # out[k] = in[order[k]]
        self.register_buffer("B", signs[: self.d].clone(), persistent=False)  # (d,)
        slots = order % min(power_of_two(self.d), L)
        self.register_buffer("slots", slots, persistent=False)  # (L,)
        self.register_buffer("G", torch.randn(L, generator=draw), persistent=False)  # (L,)
        self.norm = math.sqrt(D * self.G.double().square().sum().item())

    @property
    def gradient_shrinks(self) -> int:
        """By how much the authors' transforms make the gradient of v smaller: L."""
        return len(self.G)

    def forward(self, v: Tensor) -> Tensor:
        """P v."""
        short = min(power_of_two(self.d), len(self.G))
        h = walsh(F.pad(v[: self.d] * self.B, (0, short - self.d)))
        return walsh(_Lookup.apply(h, self.slots) * self.G)[: self.D] / self.norm


class _Lookup(torch.autograd.Function):
    """table[slots], where many slots are the same: the gradient is a sum over each."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.length = len(table)
        return table.index_select(0, slots)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slots,) = ctx.saved_tensors
        (g,) = grad_outputs
        return g.new_zeros(ctx.length).index_add_(0, slots, g), None


class Dense(nn.Module):
    """P v, P (D, d) normal with deviation 0.01; for small models."""

    gradient_shrinks = 1

    def __init__(self, D: int, d: int, draw: torch.Generator) -> None:
        super().__init__()
        self.P: Tensor
        self.register_buffer("P", 0.01 * torch.randn(D, d, generator=draw), persistent=False)

    def forward(self, v: Tensor) -> Tensor:
        """P v."""
        return self.P @ v
