"""What OFT and BOFT have in common: the inputs of a layer are turned by a block-wise rotation.

    y = W (x Rot) + b        Rot (I, I) orthogonal, of small blocks R (..., b, b)

A rotation keeps the norms of neurons and the angles between them. It is done to the inputs: W may
be stored in any way, and no (I, I) matrix is ever made. Folded, W' = W Rot'.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftcli.core.delta import Delta
from peftcli.core.layer import Layer
from peftcli.core.site import Site
from peftcli.errors import ConfigError

if TYPE_CHECKING:
    from peftcli.core.host import Host


class RotationDelta(Delta):
    """y = W (x Rot) + b, Rot (I, I) orthogonal and made of small blocks; folded, W' = W Rot'."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        if site.kind == "embedding":
            raise ConfigError(
                f"method.target_modules: {site.path} is an embedding, whose inputs are ids that do "
                "not turn. Name linear layers or convolutions."
            )
        self.turns_input = site.kind == "linear"

    def blocks(self) -> Tensor:
        """The orthogonal blocks (..., b, b)."""
        raise NotImplementedError

    def dropped(self, R: Tensor) -> Tensor:
        """The blocks with some of them replaced by the identity, while training."""
        raise NotImplementedError

    def turn(self, x: Tensor, R: Tensor, back: bool = False) -> Tensor:
        """x Rot for rows x (..., I); `back`: x Rot'."""
        raise NotImplementedError

    def turned(self, W: Tensor) -> Tensor:
        """W Rot' (O, I)."""
        R = self.blocks()
        return self.turn(W.to(R.dtype), R, back=True)

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W Rot'."""
        return self.turned(W), b

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """W (x Rot) + b; a convolution's patches are turned through its kernel."""
        with torch.autocast(x.device.type, enabled=False):  # the inverse needs float32
            R = self.dropped(self.blocks()) if self.training else self.blocks()
        if self.turns_input:
            return layer(self.turn(x, R.to(x.dtype)))
        W = self.turn(layer.weight.to(R.dtype), R, back=True)
        return layer.linear(x, W.to(x.dtype), layer.bias)


def random_blocks(n: int, p: float, device: torch.device) -> Tensor:
    """int(p n) of n blocks, drawn at random, as a mask (n,)."""
    return torch.rand(n, device=device).argsort() < int(p * n)


def identity_like(Q: Tensor) -> Tensor:
    """The identity (b, b) for blocks (..., b, b)."""
    return torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)


def cayley(Q: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1, orthogonal where Q (..., b, b) is skew."""
    eye = identity_like(Q)
    return torch.linalg.solve(eye - Q, eye + Q, left=False)


def refuses_rotation(host: Host, name: str) -> str | None:
    """Why peft's rotations cannot sit where ours do, or None where they can."""
    odd = [s.name for s in host.sites[name] if s.rows or not isinstance(s.module, nn.Linear)]
    return f"peft turns the inputs of whole linear layers only, not of {odd[0]}" if odd else None
