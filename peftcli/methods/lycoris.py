"""What LoHa and LoKr have in common, as LyCORIS has it (Yeh et al., ICLR 2024, arXiv 2309.14859):
changes of W that are dropped by rows or whole, cores of convolutions, ranks and scales, and their
place in Hugging Face peft's files.

`rank_dropout` drops rows of the weight's change, not of the rank, as LyCORIS's code does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from peftcli.core.delta import WeightDelta
from peftcli.core.layer import Layer
from peftcli.core.method import Method
from peftcli.core.site import Site

if TYPE_CHECKING:
    from peftcli.core.host import Host


class LycorisDelta(WeightDelta):
    """A change of W that is dropped row by row, or whole, while training."""

    def __init__(self, method: Lycoris, site: Site, rescales: bool) -> None:
        super().__init__()
        self.scale, self.rescales = method.scale(site), rescales
        self.rank_dropout, self.module_dropout = method.rank_dropout, method.module_dropout

    @property
    def drops(self) -> bool:
        """Whether anything is dropped now."""
        return self.training and (self.rank_dropout > 0 or self.module_dropout > 0)

    def rows_kept(self, d_out: int, device: torch.device) -> Tensor:
        """Factors (O,) of the rows of dW: 0 where dropped; all 0 where the module is. Rescaled, the
        mean over the rows is 1.
        """
        kept = (torch.rand(d_out, device=device) > self.rank_dropout).float()
        if self.rescales:
            kept = kept / kept.mean().clamp_min(1 / len(kept))  # without a row: 0, not 0/0
        return kept * (torch.rand((), device=device) > self.module_dropout)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """The layer's product with W + dW."""
        if not self.drops:
            return super().forward(x, layer)
        W = layer.weight
        W = W + self.rows_kept(len(W), W.device)[:, None] * self.delta(W)
        return layer.linear(x, W.to(x.dtype) if x.is_floating_point() else W, layer.bias)


def kernel_of(site: Site) -> int:
    """Kernel positions of a convolution; 1 elsewhere."""
    return math.prod(cast(Any, site.module).kernel_size) if site.kind == "conv" else 1


def from_core(T: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """sum_pq T[p, q, k] a[p, o] b[q, c]: (R, R, K), (R, O), (R, C) -> (O, C, K)."""
    return torch.einsum("pqk,po,qc->ock", T, a, b)


@dataclass(frozen=True)
class Lycoris(Method):
    """What LoHa and LoKr have in common: scale, dropout of rows and modules, patterns, and their
    place in peft.
    """

    family: ClassVar[str] = "low-rank"
    size_option: ClassVar[str | None] = "r"
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
    hf_fields: ClassVar[Mapping[str, str]] = {
        "r": "r",
        "alpha": "alpha",
        "rank_dropout": "rank_dropout",
        "module_dropout": "module_dropout",
        "use_effective_conv2d": "use_effective_conv2d",
    }
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        {"init_weights", "rank_pattern", "alpha_pattern"}
    )

    r: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 8.0
    rank_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    module_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    use_effective_conv2d: bool = False
    target_modules: str | tuple[str, ...] = ("q", "v")
    rank_pattern: dict[str, Annotated[int, Ge(1)]] = field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, Gt(0)]] = field(default_factory=dict)

    def rank(self, site: Site) -> int:
        """The site's rank."""
        return int(site.pick(self.rank_pattern, self.r))

    def scale(self, site: Site) -> float:
        """s = alpha / r."""
        return site.pick(self.alpha_pattern, self.alpha) / self.rank(site)

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """peft takes whole linear layers and convolutions in one or two dimensions."""
        for site in host.sites[name]:
            if not isinstance(site.module, nn.Linear | nn.Conv1d | nn.Conv2d) or site.rows:
                return f"peft has no such delta at {site.name} ({type(site.module).__name__})"
        return None

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """Ranks and alphas that differ, by path."""
        sites = host.sites[name]
        alphas = {s.path: s.pick(self.alpha_pattern, self.alpha) for s in sites}
        return {
            "rank_pattern": {s.path: self.rank(s) for s in sites if self.rank(s) != self.r},
            "alpha_pattern": {p: alpha for p, alpha in alphas.items() if alpha != self.alpha},
            "init_weights": True,
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Ranks and alphas of single modules."""
        return {key: dict(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}


def hf_core(module: nn.Module, T: Tensor) -> Tensor:
    """A core (R, R, K) in peft's shape, with the kernel's sides; those of one dimension get a 1."""
    sides = cast(Any, module).kernel_size
    return T.view(*T.shape[:2], *sides, *[1] * (2 - len(sides)))
