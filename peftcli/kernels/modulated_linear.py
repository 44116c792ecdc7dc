"""y = (W + W * (s B A + c)) x + b for a frozen W, * elementwise, B (O, R), A (R, I), c a number.

With G the gradient of the changed weight, those of B and A are s (G * W) A' and s B' (G * W).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from peftcli.kernels.choice import is_reference
from peftcli.kernels.dense_linear import beside, dense_linear


def modulated_linear_ref(
    x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor, scale: float, c: float = 0.0
) -> Tensor:
    """The equation in plain torch. x (..., I), W (O, I), b (O,) -> (..., O)."""
    return beside(x, W, b, W * (scale * B @ A + c))


def modulated_linear(
    x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor, scale: float, c: float = 0.0
) -> Tensor:
    """(W + W * (s B A + c)) x + b. x (..., I), W (O, I) and b (O,) frozen -> (..., O)."""
    if is_reference():
        return modulated_linear_ref(x, W, b, B, A, scale, c)
    return dense_linear(x, W, b, _Modulation(scale, c), B, A)


class _Modulation(NamedTuple):
    """dW of (B, A)."""

    scale: float
    c: float

    def make(self, W: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
        assert W is not None
        B, A = parts
        M = torch.mm(self.scale * B, A)
        return (M.add_(self.c) if self.c else M).mul_(W)

    def pull(
        self, G: Tensor, W: Tensor | None, parts: tuple[Tensor, ...]
    ) -> tuple[Tensor | None, ...]:
        assert W is not None
        B, A = parts
        G.mul_(W)
        return (G @ A.T).mul_(self.scale), (B.T @ G).mul_(self.scale)
