"""y = (W + W * (s B A + c)) x + b for a frozen W, * elementwise, B (O, R), A (R, I), c a number.

With G the gradient of the changed weight, those of B and A are s (G * W) A' and s B' (G * W).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peftcli.kernels.dense_linear import dense_linear


def modulated_linear_ref(
    x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor, scale: float, c: float = 0.0
) -> Tensor:
    """The equation in plain torch. x (..., I), W (O, I), b (O,) -> (..., O)."""
    return F.linear(x, W + W * (scale * B @ A + c), b)


def modulated_linear(
    x: Tensor, W: Tensor, b: Tensor | None, B: Tensor, A: Tensor, scale: float, c: float = 0.0
) -> Tensor:
    """(W + W * (s B A + c)) x + b. x (..., I), W (O, I) and b (O,) frozen -> (..., O)."""
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
