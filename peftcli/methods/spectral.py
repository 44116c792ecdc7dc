"""Spectral adapters: a change of W that is sparse in the domain of a fixed linear transform.

    dW = T(F)        F (O, I) zero but for n trained coefficients at fixed positions

A few coefficients reach every entry of W, and dW is of high rank. FourierFT and QWHA differ in T,
in the positions and in the start.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftcli.core.delta import WeightDelta
from peftcli.core.layer import Layer
from peftcli.core.method import Method
from peftcli.core.site import Site

if TYPE_CHECKING:
    from peftcli.core.host import Host


@lru_cache(maxsize=16)
def random_positions(size: int, n: int, seed: int) -> Tensor:
    """n of `size` flat positions (n,) without repeats; on the CPU's generator, so that they are the
    same everywhere. One permutation serves all layers of a shape.
    """
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:n].int()


class SpectralDelta(WeightDelta):
    """dW = T(F), F (O, I) zero but for `coefficients` at the flat `positions`."""

    def __init__(self, site: Site, positions: Tensor, persistent: bool = False) -> None:
        super().__init__()
        self.shape, self.is_linear = (site.d_out, site.d_in), site.kind == "linear"
        self.coefficients = nn.Parameter(torch.zeros(len(positions)))  # (n,)
        self.positions: Tensor  # (n,), flat in (O, I)
        self.register_buffer("positions", positions.clone(), persistent=persistent)

    def product(self, x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        """(W + dW) x + b of a linear layer; without W, dW x + b."""
        raise NotImplementedError

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """(W + dW) x + b in one operation for a plain linear layer; else dW has a product of its
        own, since a sum of weights would round it away.
        """
        if layer.is_plain:
            return self.product(x, layer.weight, layer.bias)
        y = layer(x)
        if self.is_linear:
            return y + self.product(x.to(y.dtype), None, None)
        dW = self.delta(layer.weight)
        return y + layer.linear(x, dW.to(x.dtype) if x.is_floating_point() else dW)


class SpectralMethod(Method):
    """Recipe of spectral adapters: their coefficients decay like matrices."""

    def decaying(self, host: Host) -> set[nn.Parameter]:
        """The coefficients too."""
        deltas = (d for name in host.adapters for _, d in host.deltas(name))
        mine = {d.coefficients for d in deltas if isinstance(d, SpectralDelta)}
        return super().decaying(host) | mine
