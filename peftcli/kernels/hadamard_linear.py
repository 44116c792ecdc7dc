"""y = (W + dW) x + b with dW = s F H^-1, where F (O, I) is zero but for `v` at flat positions and H
(I, I) is a Hadamard matrix: H^-1 = H' / I.

The gradient of v is s / I G H at the positions, for the gradient G of dW. For a few tokens the
transform of x is cheaper than that of dW's rows: dW x = s F (H^-1 x).
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from peftcli.kernels.choice import is_reference
from peftcli.kernels.dense_linear import beside, dense_linear
from peftcli.kernels.hadamard import hadamard, hadamard_ref
from peftcli.kernels.sparse_linear import sparse_linear, spread


class Sparse(NamedTuple):
    """F by its values v (n,) at flat positions (n,), with its height O."""

    v: Tensor
    positions: Tensor
    d_out: int


class Factors(NamedTuple):
    """H by its factors (P, P) and (Q, Q), PQ = I."""

    left: Tensor
    right: Tensor


def hadamard_linear_ref(
    x: Tensor, W: Tensor | None, b: Tensor | None, f: Sparse, h: Factors, scale: float
) -> Tensor:
    """The equation with the dense matrix H."""
    dW = scale * hadamard_ref(spread(f.positions, f.v, (f.d_out, x.shape[-1])), inverse=True)
    return beside(x, W, b, dW)


def hadamard_linear(
    x: Tensor, W: Tensor | None, b: Tensor | None, f: Sparse, h: Factors, scale: float
) -> Tensor:
    """(W + dW) x + b. x (..., I), W (O, I) and b (O,) frozen -> (..., O); without W, dW x + b."""
    if is_reference():
        return hadamard_linear_ref(x, W, b, f, h, scale)
    d_in = x.shape[-1]
    if x.numel() // d_in >= len(h.left) + len(h.right):
        return dense_linear(x, W, b, _Transformed((f.d_out, d_in), scale), *f[:2], *h)
    z = hadamard(x, *h).mul(scale / d_in).to(x.dtype)
    y = sparse_linear(z, f.positions, f.v, f.d_out, None, b)
    return y if W is None else y + F.linear(x, W)


class _Transformed(NamedTuple):
    """dW of (v, positions, left, right)."""

    shape: tuple[int, int]
    scale: float

    def make(self, W: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
        v, positions, left, right = parts
        return hadamard(spread(positions, self.scale * v, self.shape), left, right, inverse=True)

    def pull(
        self, G: Tensor, W: Tensor | None, parts: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        v, positions, left, right = parts
        dF = hadamard(G, left, right).reshape(-1)
        return (dF[positions] * (self.scale / self.shape[1])).to(v.dtype), None, None, None
