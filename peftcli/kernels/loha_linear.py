"""y = (W + s (W1a W1b) * (W2a W2b)) x + b for a frozen W, * elementwise, Wia (O, R), Wib (R, I).

The elementwise product of two matrices of rank R is one matrix of rank R^2: its factors are all
products of a column of W1a with one of W2a, and of a row of W1b with one of W2b. With T tokens that
is a LoRA of 6 T R^2 (I + O) operations beside the frozen product, and no (O, I) matrix; the dense
change costs 2 T I O for its gradient. Each is taken where it costs less.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference
from peftcli.kernels.dense_linear import beside, dense_linear
from peftcli.kernels.lora_linear import lora_linear


class Pairs(NamedTuple):
    """W1a (O, R), W1b (R, I), W2a (O, R), W2b (R, I)."""

    W1a: Tensor
    W1b: Tensor
    W2a: Tensor
    W2b: Tensor


def loha_linear_ref(x: Tensor, W: Tensor, b: Tensor | None, p: Pairs, scale: float) -> Tensor:
    """The equation in plain torch. x (..., I), W (O, I), b (O,) -> (..., O)."""
    return beside(x, W, b, scale * (p.W1a @ p.W1b) * (p.W2a @ p.W2b))


def loha_linear(x: Tensor, W: Tensor, b: Tensor | None, p: Pairs, scale: float) -> Tensor:
    """(W + dW) x + b. x (..., I), W (O, I) frozen, b (O,) frozen -> (..., O)."""
    if is_reference():
        return loha_linear_ref(x, W, b, p, scale)
    d_out, d_in = W.shape
    if 3 * p.W1a.shape[1] ** 2 * (d_in + d_out) < d_in * d_out:
        return lora_linear(x, W, b, *as_lora(p), scale)
    return dense_linear(x, W, b, _Product(scale), *p)


def as_lora(p: Pairs) -> tuple[Tensor, Tensor]:
    """A (R^2, I) and B (O, R^2) with B A = (W1a W1b) * (W2a W2b)."""
    A = (p.W1b[:, None] * p.W2b).flatten(0, 1)
    return A, (p.W1a[:, :, None] * p.W2a[:, None]).flatten(1)


def hadamard_product(W1a: Tensor, W1b: Tensor, W2a: Tensor, W2b: Tensor) -> Tensor:
    """(W1a W1b) * (W2a W2b), (O, I). Only the factors are saved for the backward pass."""
    return cast(Tensor, _HadamardProduct.apply(W1a, W1b, W2a, W2b))


class _HadamardProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *p: Tensor) -> Tensor:
        ctx.save_for_backward(*p)
        with torch.autocast(p[0].device.type, enabled=False):
            return _product(p)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, ...]:
        (G,) = grad_outputs
        with torch.autocast(G.device.type, enabled=False):
            return _pulled(G, ctx.saved_tensors)


class _Product(NamedTuple):
    """dW of `Pairs`."""

    scale: float

    def make(self, W: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
        return _product((self.scale * parts[0], *parts[1:]))

    def pull(
        self, G: Tensor, W: Tensor | None, parts: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        return tuple(self.scale * grad for grad in _pulled(G, parts))


def _product(p: tuple[Tensor, ...]) -> Tensor:
    W1a, W1b, W2a, W2b = p
    return (W1a @ W1b).mul_(W2a @ W2b)


def _pulled(G: Tensor, p: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of the four from that of the product."""
    W1a, W1b, W2a, W2b = p
    G1 = (W2a @ W2b).mul_(G)
    grads = G1 @ W1b.T, W1a.T @ G1
    G2 = torch.mm(W1a, W1b, out=G1).mul_(G)
    return *grads, G2 @ W2b.T, W2a.T @ G2
