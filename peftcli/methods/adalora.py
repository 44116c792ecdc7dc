"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning. Zhang et al., ICLR 2023,
arXiv 2303.10512.

    y = W x + b + alpha / (r0 + 1e-5) B diag(E) A x        A (R, I), E (R, 1), B (O, R), R = r0

The update is kept near the form of an SVD, so that pruning a singular value E_i loses little and it
can come back. Every step scores the triplets (A_i, E_i, B_i) of all sites by smoothed sensitivity;
a budget that falls cubically from r0 to `target_r` a site says how many keep their E.

The optimizer's moments of a pruned E stay, so E leaves zero and is pruned again, as in the official
code. Three departures: the averages are part of the state, so that a run resumes exactly (peft
drops them); a budget that prunes nothing is skipped, where both codes raise; E never decays, where
the official recipes that have weight decay (MRPC, RTE) do not set it apart. Step `T - tfinal`
always prunes (peft; the official code only where `deltaT` divides it), and the following steps
prune by the scores of then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from peftcli.core.delta import Delta
from peftcli.core.graft import deltas_of
from peftcli.core.method import Method, Step
from peftcli.core.rows import RowsDelta
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.methods.lora import LoRADelta
from peftcli.methods.low_rank import LowRank

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

FACTORS = ("A", "E", "B")


class AdaLoRADelta(LoRADelta):
    """dW = s B diag(E) A  (Zhang et al. 2023, eq. 3), with the averages that score its triplets."""

    kept: Tensor  # (R,) triplets that the last allocation left

    def __init__(self, site: Site, r: int, scale: float, dropout: float = 0.0) -> None:
        if site.groups > 1:
            raise ConfigError(
                f"method=adalora: the triplets of {site.path} would span its {site.groups} "
                "convolution groups. Leave it out of method.target_modules, or take method=lora."
            )
        super().__init__(site, r, scale, dropout)
        self.E = nn.Parameter(torch.zeros(r, 1))  # (R, 1), zero so dW = 0 at start
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        for name in FACTORS:  # averages of |w dL/dw| and of its deviation, shaped as w
            for average in ("sensitivity", "uncertainty"):
                zeros = torch.zeros_like(self.get_parameter(name).data)
                self.register_buffer(f"{average}_{name}", zeros)
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool))
        self.gradients: dict[str, Tensor] = {}  # of this step, from the backward pass to its end

    def factors(self) -> tuple[Tensor, Tensor]:
        """(diag(E) A, B)."""
        return self.A * self.E, self.B

    def hold_gradients(self) -> None:
        """Keep this step's gradients past the optimizer; clipping changes them in place."""
        held = {name: self.get_parameter(name).grad for name in FACTORS}
        self.gradients = {name: g for name, g in held.items() if g is not None}

    def update_scores(self, beta1: float, beta2: float) -> None:
        """Average the sensitivity |w dL/dw| of every element, and how far it is from its average.
        Gradients that are not finite, with which no step was taken, are passed over.
        """
        for name, gradient in self.gradients.items():
            now = (self.get_parameter(name) * gradient).abs()
            if not now.isfinite().all():
                continue
            mean, spread = self._averages(name)
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            spread.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def _averages(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")

    def scores(self) -> Tensor:
        """S (R,): E's element score plus the means of those of A's row and B's column."""
        A, E, B = (torch.mul(*self._averages(name)) for name in FACTORS)
        return E[:, 0] + A.mean(1) + B.mean(0)

    def prune(self, threshold: Tensor) -> None:
        """Set E to 0 where the score is not above `threshold`."""
        self.kept.copy_(self.scores() > threshold)
        self.E.mul_(self.kept[:, None])

    def skew(self) -> Tensor:
        """||A A' - 1||_F + ||B' B - 1||_F."""
        one = torch.eye(len(self.A), device=self.A.device, dtype=self.A.dtype)
        return (self.A @ self.A.T - one).norm() + (self.B.T @ self.B - one).norm()


@dataclass(frozen=True)
class AdaLoRA(Method):
    """Low-rank adaptation that gives each site the rank which it can use."""

    family: ClassVar[str] = "low-rank"
    size_option: ClassVar[str | None] = "init_r"
    peft_type: ClassVar[str | None] = "ADALORA"
    hf_fields: ClassVar[Mapping[str, str]] = {
        "init_r": "init_r",
        "target_r": "target_r",
        "tinit": "tinit",
        "tfinal": "tfinal",
        "deltaT": "deltaT",
        "beta1": "beta1",
        "beta2": "beta2",
        "orth_reg": "orth_reg_weight",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
    }
    hf_harmless: ClassVar[frozenset[str]] = LowRank.hf_harmless | {"r", "total_step"}

    target_r: Annotated[int, Ge(1)] = 8
    init_r: Annotated[int, Ge(1)] = 12
    tinit: Annotated[int, Ge(0)] = 0
    tfinal: Annotated[int, Ge(0)] = 0
    deltaT: Annotated[int, Ge(1)] = 1  # noqa: N815 - the paper's and peft's name
    beta1: Annotated[float, Gt(0), Lt(1)] = 0.85
    beta2: Annotated[float, Gt(0), Lt(1)] = 0.85
    orth_reg: Annotated[float, Ge(0)] = 0.1
    alpha: float = 16.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"

    def build(self, site: Site) -> AdaLoRADelta:
        """Triplets for the site; the scale keeps to the initial rank."""
        scale = self._alpha / (self.init_r + 1e-5)
        return AdaLoRADelta(site, self.init_r, scale, self.dropout)

    @property
    def _alpha(self) -> float:
        return self.alpha if self.alpha > 0 else float(self.init_r)

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Triplets on every site."""
        if self.target_r > self.init_r:
            raise ConfigError(
                f"method.target_r={self.target_r}: must not be above method.init_r={self.init_r}."
            )
        super().setup(host, data)

    def budget(self, t: int, total: int, sites: int) -> int:
        """Triplets of all sites that step `t`, from 1, of `total` leaves alive."""
        first, last = self.init_r * sites, self.target_r * sites
        end = total - self.tfinal
        if t <= self.tinit:
            return first
        if t > end:
            return last
        return int(last + (first - last) * (1 - (t - self.tinit) / (end - self.tinit)) ** 3)

    def decaying(self, host: Host) -> set[nn.Parameter]:
        """Not the singular values E, which are scales for all that they stand in a column."""
        return super().decaying(host) - {delta.E for delta in self._deltas(host)}

    def before_step(self, host: Host, t: Step) -> None:
        """Refuse a schedule without a step to prune in."""
        if self.tinit + self.tfinal >= t.total:
            raise ConfigError(
                f"method.tinit={self.tinit} and method.tfinal={self.tfinal} leave none of the "
                f"{t.total} steps to prune in; their sum must be below it."
            )

    def penalty(self, host: Host) -> Tensor:
        """orth_reg times the mean of ||A A' - 1||_F and ||B' B - 1||_F over all sites."""
        skews = [delta.skew() for delta in self._deltas(host)]
        return self.orth_reg * torch.stack(skews).mean() / 2

    def after_backward(self, host: Host, t: Step) -> None:
        """Hold the gradients for the scores, which take the weights after the step."""
        for delta in self._deltas(host):
            delta.hold_gradients()

    @torch.no_grad()
    def after_step(self, host: Host, t: Step) -> None:
        """Score all triplets, then prune to the budget where it is due."""
        deltas, now, end = list(self._deltas(host)), t.index + 1, t.total - self.tfinal
        for delta in deltas:
            if now < end:
                delta.update_scores(self.beta1, self.beta2)
            delta.gradients = {}
        if now >= end or (now > self.tinit and now % self.deltaT == 0):
            prune(deltas, self.init_r * len(deltas) - self.budget(now, t.total, len(deltas)))

    def _deltas(self, host: Host) -> Iterator[AdaLoRADelta]:
        for name, method in host.adapters.items():
            if method is self:
                yield from (d for _, d in host.deltas(name) if isinstance(d, AdaLoRADelta))

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """Modules that peft has no triplets for."""
        for site in host.sites[name]:
            if site.kind == "embedding" or (
                isinstance(site.module, _ConvNd) and not isinstance(site.module, nn.Conv2d)
            ):
                return f"peft has no AdaLoRA for {type(site.module).__name__} ({site.path})"
        return None

    def hf_module(self, module: nn.Module, delta: Delta) -> dict[str, Tensor]:
        """The triplets that are alive; the live tensors themselves where all are."""
        A, E, B, alive = _triplets(delta)
        if not alive.all():
            A, E, B = A[alive], E[alive], B[:, alive]
        return {"lora_A": A, "lora_E": E, "lora_B": B}

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """peft's one initial rank is that of the widest module: fused roles add up. It wants a
        number of steps, too.
        """
        paths = dict.fromkeys(site.path for site in host.sites[name])
        modules = {path: host.model.get_submodule(path) for path in paths}
        alive = {path: _triplets(deltas_of(m)[name])[3].tolist() for path, m in modules.items()}
        r = max(map(len, alive.values()))
        pattern = {f"{path}.lora_E": a + [False] * (r - len(a)) for path, a in alive.items()}
        return {
            "init_r": r,
            "lora_alpha": self._alpha * (r + 1e-5) / (self.init_r + 1e-5),
            "rank_pattern": None if all(all(a) for a in pattern.values()) else pattern,
            "total_step": self.tinit + self.tfinal + 1,
            "bias": "none",
            "fan_in_fan_out": all(isinstance(m, Conv1D) for m in modules.values()),
        }

    @classmethod
    def hf_acting(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """All initial triplets: those that the file leaves out are zero."""
        whole = dict(tensors)
        for key, alive in (config.get("rank_pattern") or {}).items():
            path, rows = key.removesuffix(".lora_E"), torch.tensor(alive)
            for factor in FACTORS:
                name = f"base_model.model.{path}.lora_{factor}"
                axis = 1 if factor == "B" else 0
                size = list(tensors[name].shape)
                size[axis] = len(alive)
                whole[name] = torch.zeros(size).index_copy(
                    axis, rows.nonzero()[:, 0], tensors[name]
                )
        return whole

    def load_hf(self, host: Host, name: str, tensors: Mapping[str, Tensor]) -> None:
        """The triplets, and which of them are alive."""
        super().load_hf(host, name, tensors)
        for _, delta in host.deltas(name):
            assert isinstance(delta, AdaLoRADelta)
            delta.kept.copy_(delta.E[:, 0] != 0)


def prune(deltas: list[AdaLoRADelta], count: int) -> None:
    """Set the `count` values E of the lowest scores among all deltas to 0; of equals, all."""
    if count > 0:
        threshold = torch.cat([delta.scores() for delta in deltas]).kthvalue(count).values
        for delta in deltas:
            delta.prune(threshold)


def _triplets(delta: Delta) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(A, E, B, which are alive) of a module. The roles of a fused linear become one: B is zero on
    other rows. Between two prunings a pruned E may be alive again.
    """
    if isinstance(delta, AdaLoRADelta):
        return delta.A, delta.E, delta.B, delta.kept | (delta.E.detach()[:, 0] != 0)
    assert isinstance(delta, RowsDelta), type(delta)
    parts = {role: _triplets(delta.part(role)) for role in delta.parts}
    A, E, alive = (torch.cat([part[i] for part in parts.values()]) for i in (0, 1, 3))
    return A, E, delta.side_by_side({role: part[2] for role, part in parts.items()}), alive
