"""Frozen linears whose weights are whole numbers of few bits in 32-bit words, as GPTQ (Frantar et
al. 2023, arXiv 2210.17323) and AWQ (Lin et al. 2024, arXiv 2306.00978) leave them:

    W[o, i] = scales[g, o] * (codes[i, o] - zeros[g, o]),    g = i // group_size, or g_idx[i]

A product multiplies by the weight dequantised anew, forward and backward: it is dense for the
length of one product, and a layer saves nothing of it for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from peftcli.errors import DataError
from peftcli.kernels.precision import product_dtype

WORD = 32  # bits
Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None]  # words, scales, zero points, group_of


@dataclass(frozen=True)
class Packing:
    """How the numbers lie in the words."""

    bits: int
    group_size: int  # inputs that share a scale and a zero point; -1: all
    order: tuple[int, ...] = ()  # of the outputs in a word; empty: a word holds inputs, in theirs
    zeros_less_one: bool = False  # zero points are stored less one

    def shapes(self, d_out: int, d_in: int) -> dict[str, tuple[int, ...]]:
        """Of what a linear (d_out, d_in) stores, by name."""
        groups = 1 if self.group_size == -1 else math.ceil(d_in / self.group_size)
        words = lambda n: n * self.bits // WORD  # noqa: E731
        return {
            "qweight": (d_in, words(d_out)) if self.order else (words(d_in), d_out),
            "qzeros": (groups, words(d_out)),
            "scales": (groups, d_out),
            "g_idx": (d_in,),
        }


class PackedLinear(nn.Linear):
    """y = W x + b with a packed, frozen W. `stored` holds qweight, qzeros, scales and, where the
    file has them, g_idx and bias; `settle` comes once these are filled.

    `dtype` is that of `dequantised`; `stands_for` the class of the plain module.
    """

    qzeros: Tensor  # as stored, until `settle`
    scales: Tensor  # (groups, O)
    zeros: Tensor  # (groups, O), uint8
    group_of: Tensor | None  # (I,), of each input; None where groups are runs of inputs

    def __init__(
        self,
        packing: Packing,
        d_in: int,
        d_out: int,
        stored: Mapping[str, Tensor],
        dtype: torch.dtype,
        stands_for: type[nn.Module] = nn.Linear,
    ) -> None:
        nn.Module.__init__(self)
        self.packing, self.dtype, self.stands_for = packing, dtype, stands_for
        self.in_features, self.out_features = d_in, d_out
        self.qweight = nn.Parameter(stored["qweight"], requires_grad=False)
        for name in ("qzeros", "scales", "g_idx"):
            self.register_buffer(name, stored.get(name))
        bias = stored.get("bias")
        frozen = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("bias", frozen)

    @property
    def weight(self) -> nn.Parameter:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The words."""
        return self.qweight

    @torch.no_grad()
    def settle(self) -> None:
        """Keep zero points (groups, O) as they are meant, and g_idx only where groups are no runs
        of inputs. Raises `DataError` where it names a group that is not there.
        """
        self.register_buffer("zeros", self._zero_points())
        size = self.in_features if self.packing.group_size == -1 else self.packing.group_size
        runs = torch.arange(self.in_features, device=self.qweight.device) // size
        groups: Tensor | None = self._buffers["g_idx"]
        if groups is not None and (groups.min() < 0 or groups.max() >= len(self.scales)):
            raise DataError(f"g_idx names group {int(groups.max())} of {len(self.scales)}")
        if self.in_features % size == 0 and (groups is None or torch.equal(groups, runs.int())):
            self.group_of = None
        else:
            self.register_buffer("group_of", runs if groups is None else groups.long())
        del self.qzeros, self.g_idx

    def _zero_points(self) -> Tensor:
        """(groups, O), uint8."""
        bits, words = self.packing.bits, self.qzeros
        less_one = self.packing.zeros_less_one
        if less_one and WORD % bits == 0:
            # in whole words, as one was subtracted: what a zero point of 0 borrowed goes back
            words = words + sum(1 << shift for shift in range(0, WORD, bits))
        zeros = unpack(words.T, bits, self.packing.order).T.contiguous()
        return (zeros + 1) % (1 << bits) if less_one and WORD % bits else zeros

    def dequantised(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (O, I), rounded once, to `dtype`."""
        return _dequantise(self._tensors(), self.packing, dtype or self.dtype)

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """The module that it stands for, with the dequantised weight."""
        d_in, d_out, bias = self.in_features, self.out_features, self.bias
        W = self.dequantised(dtype)
        with torch.device("meta"):
            if issubclass(self.stands_for, Conv1D):
                module: Any = Conv1D(d_out, d_in)
            else:
                module = nn.Linear(d_in, d_out, bias is not None)
        is_conv1d = isinstance(module, Conv1D)
        module.weight = nn.Parameter(W.T.contiguous() if is_conv1d else W, requires_grad=False)
        module.bias = None if bias is None else nn.Parameter(bias.to(dtype), requires_grad=False)
        return module

    def forward(self, input: Tensor) -> Tensor:
        """x (..., I) -> (..., O), in the type that products run in."""
        dtype = product_dtype(input)
        y = _Product.apply(input.to(dtype), self.packing, *self._tensors())
        return y if self.bias is None else y + self.bias.to(dtype)

    def _tensors(self) -> Tensors:
        return self.qweight, self.scales, self.zeros, self.group_of


class _Product(torch.autograd.Function):
    """x W' for the packed W, with a gradient for x alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packing: Packing,
        qweight: Tensor,
        scales: Tensor,
        zeros: Tensor,
        group_of: Tensor | None,
    ) -> Tensor:
        ctx.packing = packing
        ctx.save_for_backward(qweight, scales, zeros, group_of)
        return F.linear(x, _dequantise((qweight, scales, zeros, group_of), packing, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        with torch.autocast(dy.device.type, enabled=False):
            W = _dequantise(ctx.saved_tensors, ctx.packing, dy.dtype)
            return dy @ W, None, None, None, None, None


def _dequantise(tensors: Tensors, packing: Packing, dtype: torch.dtype) -> Tensor:
    """W (O, I). The product is formed in float32, where it is exact for scales of 16 bits."""
    qweight, scales, zeros, group_of = tensors
    if packing.order:
        codes_IO = unpack(qweight.T, packing.bits, packing.order).T
    else:
        codes_IO = unpack(qweight, packing.bits)
    if group_of is None:
        W_gIO = codes_IO.unflatten(0, (len(scales), -1)).float()
        W_IO = W_gIO.sub_(zeros[:, None]).mul_(scales[:, None].float()).flatten(0, 1)
    else:
        W_IO = codes_IO.float().sub_(zeros[group_of]).mul_(scales[group_of].float())
    return W_IO.T.to(dtype)


def unpack(words: Tensor, bits: int, order: Sequence[int] = ()) -> Tensor:
    """The numbers (N, C), uint8, of streams of `bits` each, low bits first, in `words`
    (N * bits / 32, C), int32. With `order`, place k of a word is number `order[k]` of its numbers.
    """
    period = WORD // math.gcd(WORD, bits)  # numbers from one that starts a word to the next such
    held = words.unflatten(0, (-1, period * bits // WORD))
    found = words.new_empty((len(held), period, words.shape[1]), dtype=torch.uint8)
    for k in range(period):
        word, shift = divmod(k * bits, WORD)
        number = held[:, word] >> shift
        if (low := WORD - shift) < bits:  # its high bits start the next word
            number = number & ((1 << low) - 1) | held[:, word + 1] << low
        found[:, order[k] if order else k] = number & ((1 << bits) - 1)
    return found.flatten(0, 1)
