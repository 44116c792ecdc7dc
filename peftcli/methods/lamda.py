"""LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation. Azizi,
Kundu, Pedram, Findings of EMNLP 2024, arXiv 2406.12832.

    y = W x + b + s B S A x        A (R, I) frozen, S (R, R), B (O, R), s = alpha / r

A and B span the singular directions of W, so a small square S between them is enough to learn. B
trains at first and freezes column by column, the largest singular values first, until after the
share `eta` of all steps S trains alone: f(t) = min(r, floor(r t / (eta T))) columns are frozen.

LaMDA++ (`rank_alloc`) gives flat spectra more rank, by E(r), the share that the first r have in the
sum of all squared singular values. `spectrum` sorts the modules of each role by E(r) into five
equal groups of ranks r/2, 3r/4, r, 5r/4, 3r/2, the flattest highest; `energy` takes the smallest
common level of E that costs r on average, within the same bounds.

The paper leaves the start of S and LaMDA++'s exact rule open: `svd_residual`, largest columns first
and both rules are ours. As LoRA here, `svd_residual` never writes W: the delta is s (B S A - C0 A)
with C0 = B S at start in a buffer. The official code has other starts (`init=random`) and freezes
one column each eta T steps, though the paper says all of them within eta T
(`freeze_law=official_code`); it only zeroes gradients, under which AdamW moves frozen columns on:
here their values are put back. A module's rank is at most its shorter side. A file for others is
plain LoRA, of the factors A and B S - C0.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from peftcli.core.layer import Layer
from peftcli.core.method import Step
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.methods.lora import LoRADelta
from peftcli.methods.low_rank import LowRank

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class LaMDADelta(LoRADelta):
    """dW = s B S A, or s (B S - C0) A where W contains the start C0 A already."""

    def __init__(self, site: Site, r: int, scale: float, dropout: float) -> None:
        super().__init__(site, r, scale, dropout)
        self.A.requires_grad_(False)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.S = nn.Parameter(torch.empty(r, r))  # (R, R)
        nn.init.kaiming_uniform_(self.S, a=math.sqrt(5))
        self.register_buffer("C0", None)  # (O, R), where the start is a part of W
        self.held: Tensor | None = None  # frozen columns of B, for the length of a step

    @torch.no_grad()
    def start_from_svd(self, W: Tensor, residual: bool) -> None:
        """A = V_r', B = U_r; S = diag(sigma_r) / s as a part of W, or 0."""
        r = len(self.S)
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        self.A.copy_(Vh[:r])
        self.B.copy_(U[:, :r])
        self.S.copy_(
            torch.diag(sigma[:r] / self.scale if residual else torch.zeros_like(sigma[:r]))
        )
        self.C0 = self.B @ self.S if residual else None

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole change as of LoRA: A and B S - C0."""
        D = self.B @ self.S
        return self.A, D if self.C0 is None else D - self.C0

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """W x + b + s D A drop(x), D = B S - C0. A is frozen, so the backward pass needs A x and
        not x; D is made in float32, where the start cancels.
        """
        A, D = self.factors()
        y = layer(x)
        x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        return y + self.scale * layer.mix(layer.linear(x, A.to(y.dtype)), D.to(y.dtype))


def energies(W: Tensor) -> Tensor:
    """E(1), E(2), ...: the shares of the first singular values in the sum of all squares."""
    squares = torch.linalg.svdvals(W.float()).square()
    return squares.cumsum(0) / squares.sum()


def by_groups(levels: Mapping[str, float], r: int) -> dict[str, int]:
    """Ranks from 3r/2 for the lowest fifth of E(r) down to r/2 for the highest; r on average."""
    ranks = [6 * r // 4, 5 * r // 4, r, 3 * r // 4, r // 2]
    flattest_first = sorted(levels, key=lambda name: levels[name])
    n = len(flattest_first)  # group of the middle of each: symmetric, so the mean is r for any n
    return {name: ranks[5 * (2 * i + 1) // (2 * n)] for i, name in enumerate(flattest_first)}


def by_energy(E: Mapping[str, Tensor], r: int) -> dict[str, int]:
    """r_i = min {k: E_i(k) >= tau}, within r/2 and 3r/2, for the smallest tau whose mean is r."""

    def ranks(tau: float) -> dict[str, int]:
        counts = {name: int((e < tau).sum()) + 1 for name, e in E.items()}
        return {name: min(max(k, r // 2), 3 * r // 2) for name, k in counts.items()}

    low, high = 0.0, 1.0
    for _ in range(50):
        tau = (low + high) / 2
        if sum(ranks(tau).values()) >= r * len(E):
            high = tau
        else:
            low = tau
    return ranks(high)


@dataclass(frozen=True)
class LaMDA(LowRank):
    """A square matrix between frozen spectral projections, of linear layers and convolutions."""

    r: Annotated[int, Ge(1)] = 32
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    eta: Annotated[float, Gt(0), Le(1)] = 0.3
    freeze_law: Literal["linear", "official_code"] = "linear"
    init: Literal["svd_residual", "svd_zero", "random"] = "svd_residual"
    rank_alloc: Literal["uniform", "spectrum", "energy"] = "uniform"

    def rank(self, site: Site) -> int:
        """The site's rank, at most its shorter side."""
        return min(super().rank(site), site.d_in, site.d_out)

    def build(self, site: Site) -> LaMDADelta:
        """A started triple of factors for the site."""
        delta = LaMDADelta(site, self.rank(site), self.scale(site), self.dropout)
        if self.init != "random":
            delta.to(site.device).start_from_svd(site.weight.float(), self.init == "svd_residual")
        return delta

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Allocate ranks, then graft."""
        sites = host.find(self.target_modules)
        if odd := next((s for s in sites if s.kind == "embedding" or s.groups > 1), None):
            raise ConfigError(
                f"method=lamda adapts linear layers and convolutions without groups, not "
                f"{odd.path}. Change method.target_modules."
            )
        method = replace(self, rank_pattern=self.allocated(sites) | self.rank_pattern)
        for site in sites:
            if method.rank(site):
                host.graft(site, method.build(site))

    def allocated(self, sites: Sequence[Site]) -> dict[str, int]:
        """LaMDA++: the ranks of the sites by name; none where all are alike."""
        if self.rank_alloc == "uniform":
            return {}
        if self.rank_alloc == "spectrum" and self.r % 8:
            raise ConfigError(
                f"method.r={self.r} with method.rank_alloc=spectrum: must be a multiple of 8, so "
                "that the five ranks from r/2 to 3r/2 are even."
            )
        if sites[0].device.type == "meta":  # a model without weights: the mean of all
            return {}
        E = {site.name: energies(site.weight) for site in sites}
        if self.rank_alloc == "energy":
            return by_energy(E, self.r)
        kinds: dict[str, dict[str, float]] = defaultdict(dict)
        for site in sites:
            e = E[site.name]
            kind = site.role or site.path.rpartition(".")[2]
            kinds[kind][site.name] = float(e[min(self.r, len(e)) - 1])
        return {name: k for kind in kinds.values() for name, k in by_groups(kind, self.r).items()}

    # -- gradual freezing of B ---------------------------------------------------------------------
    def frozen(self, r: int, t: Step) -> int:
        """f(t): how many columns of a B of rank r rest at step t."""
        share = t.index / (self.eta * t.total)  # of the freezing phase
        steps = share if self.freeze_law == "official_code" else r * share
        return min(r, math.floor(steps + 1e-9))

    def _freezing(self, host: Host, t: Step) -> Iterator[tuple[LaMDADelta, int]]:
        """The method's deltas with columns that rest."""
        for name in (n for n, method in host.adapters.items() if method is self):
            for _, delta in host.deltas(name):
                assert isinstance(delta, LaMDADelta)
                if f := self.frozen(len(delta.S), t):
                    yield delta, f

    def before_step(self, host: Host, t: Step) -> None:
        """Hold the frozen columns, which momentum and weight decay would move on."""
        for delta, f in self._freezing(host, t):
            delta.held = delta.B[:, :f].detach().clone()

    def after_backward(self, host: Host, t: Step) -> None:
        """Frozen columns have no gradient; a B that is wholly frozen takes no part in the step."""
        for delta, f in self._freezing(host, t):
            if f == len(delta.S):
                delta.B.grad = None
            elif delta.B.grad is not None:
                delta.B.grad[:, :f] = 0

    @torch.no_grad()
    def after_step(self, host: Host, t: Step) -> None:
        """Put the frozen columns back; forget the optimizer's state of a B that is wholly
        frozen.
        """
        for delta, f in self._freezing(host, t):
            assert delta.held is not None
            delta.B[:, :f] = delta.held
            delta.held = None
            if f == len(delta.S):
                host.reset_optimizer([delta.B])

    # -- Hugging Face peft -------------------------------------------------------------------------
    @classmethod
    def reads_hf(cls, config: Mapping[str, Any]) -> bool:
        """None: what it writes is LoRA's."""
        return False
