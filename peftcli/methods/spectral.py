"""Spectral adapters: a change of W that is sparse in the domain of a fixed linear transform.

    dW = T(F)        F (O, I) zero but for n trained coefficients at fixed positions

A few coefficients reach every entry of W, and dW is of high rank. FourierFT and QWHA differ in T,
in the positions and in the start.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcli.core.delta import WeightDelta
from peftcli.core.layer import Layer
from peftcli.core.method import Method
from peftcli.core.site import Site
from peftcli.kernels.sparse_linear import spread

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
        self.shape = (site.d_out, site.d_in)
        self.coefficients = nn.Parameter(torch.zeros(len(positions)))  # (n,)
        self.positions: Tensor  # (n,), flat in (O, I)
        self.register_buffer("positions", positions.clone(), persistent=persistent)

    def transform(self, spectrum: Tensor) -> Tensor:
        """T(F), (O, I)."""
        raise NotImplementedError

    def delta(self, W: Tensor) -> Tensor:
        """T(F)."""
        return self.transform(spread(self.positions, self.coefficients, self.shape))

    def branch(self, x: Tensor, layer: Layer) -> Tensor:
        """The product of `x` with dW; a transform may have a cheaper way."""
        dW = self.delta(layer.weight)
        return layer.linear(x, dW.to(x.dtype) if x.is_floating_point() else dW)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """W x + b + dW x: added to the output, since a sum of weights would round dW away."""
        return layer(x) + self.branch(x, layer)


class SpectralMethod(Method):
    """Recipe of spectral adapters: their coefficients decay like matrices."""

    def param_groups(self, host: Host, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The coefficients in a group of their own, everything else as usual."""
        mine = {
            d.coefficients
            for name in host.adapters
            for _, d in host.deltas(name)
            if isinstance(d, SpectralDelta)
        }
        groups = super().param_groups(host, lr, weight_decay)
        for group in groups:
            group["params"] = [p for p in group["params"] if p not in mine]
        coefficients = [p for p in host.trained().values() if p in mine]
        groups.append({"params": coefficients, "lr": lr, "weight_decay": weight_decay})
        return [g for g in groups if g["params"]]
