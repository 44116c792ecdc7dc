"""SpIEL: Scaling Sparse Fine-Tuning to Large Language Models. Ansell et al. 2024, arXiv 2401.16405.

    W'.flat[indices] = W.flat[indices] + values        W (O, I) frozen, indices (K,), values (K,)

Again and again the entries that moved least are dropped and others grow where the gradient asks for
them, so a few entries are found that matter, in memory of their number and never of the model's.

SpIEL-AG (`growth=ag`) grows the entries with the largest gradient, summed over some steps; its
Adam has an age for every entry. SpIEL-MA (`growth=ma`) needs no gradient of other entries: it grows
by the outer product of the row and column statistics of SM3 (Anil et al. 2019, arXiv 1901.11150).
The budget is a share of the whole model, embeddings included, split over the targets by size.

A choice goes with the optimizer's step c = 1, 2, ...: gradients are watched in the steps with
c mod S <= A, and entries are chosen anew after each with c mod S = A. The first choice replaces all
(policy `linear`), since the first positions are random.

Departures from the official code: a sample is the gradient of an optimizer step, where the code has
that of a micro-batch, so that seeded moments have the scale of Adam's own; numbers that are not
finite are no samples; the unfinished samples of a phase are in the checkpoint. The paper's abstract
drops by change, its code (and this) by |value|, the distance from the pretrained weight. As in the
code, a grown entry's first update is corrected for its age before that step is counted. Changes
are float32 over any base; over one of 4 bits (qSpIEL) the code has them in bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.optim import Optimizer

from peftcli.core.method import Method, Step
from peftcli.dist.ranks import Ranks
from peftcli.errors import ConfigError, NotApplicable
from peftcli.methods.sparse import SparseDelta, budget_of, random_positions
from peftcli.methods.spiel_optimizers import SM3, AgedAdamW

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

AT_ONCE = 2**22  # scores of entries that are compared at once


@dataclass(frozen=True)
class SpIEL(Method):
    """Sparse fine-tuning whose positions are dropped and grown while it trains."""

    family: ClassVar[str] = "sparse"
    size_option: ClassVar[str | None] = "num_tunable_weights"

    growth: Literal["ag", "ma"] = "ag"
    num_tunable_weights: Annotated[int, Ge(1)] | None = None
    density: Annotated[float, Gt(0), Le(1)] = 0.01
    reselection_steps: Annotated[int, Ge(2)] = 20
    selection_accumulation_steps: Annotated[int, Ge(1)] = 5
    initial_reselection_rate: Annotated[float, Ge(0), Le(1)] = 0.2
    reselection_rate_policy: Literal["linear", "cosine"] = "linear"
    weight_decay: Annotated[float, Ge(0)] = 10.0
    target_modules: str | tuple[str, ...] = "all-linear"

    def __post_init__(self) -> None:
        """Refuse phases that never end."""
        if self.selection_accumulation_steps >= self.reselection_steps:
            raise ConfigError(
                f"method.selection_accumulation_steps={self.selection_accumulation_steps} must be "
                f"below method.reselection_steps={self.reselection_steps}."
            )

    # -- positions ---------------------------------------------------------------------------------
    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Random positions, as many on every target as its share of the budget."""
        sites = host.find(self.target_modules)
        sizes = [site.d_out * site.d_in for site in sites]
        budget = budget_of(
            host, sizes, "num_tunable_weights", self.num_tunable_weights, self.density
        )
        counts = [budget * size // sum(sizes) for size in sizes]
        if not any(counts):
            raise NotApplicable(
                f"{budget} weights are too few for {len(sites)} targets of "
                f"{type(host.model).__name__}; raise method.density or name fewer targets."
            )
        for site, k in zip(sites, counts, strict=True):
            if k:
                host.graft(site, SparseDelta(site, random_positions(site, k)))

    def _deltas(self, host: Host) -> list[SparseDelta]:
        mine = (name for name, method in host.adapters.items() if method is self)
        held = (delta for name in mine for _, delta in host.deltas(name))
        return [delta for delta in held if isinstance(delta, SparseDelta)]

    # -- schedule ----------------------------------------------------------------------------------
    def watches(self, step: int) -> bool:
        """Whether gradients of optimizer step `step`, from 1, feed a choice."""
        return step % self.reselection_steps <= self.selection_accumulation_steps

    def rate(self, step: int, total: int) -> float:
        """The share of entries that is replaced after step `step`; 0 where nothing is chosen."""
        if step % self.reselection_steps != self.selection_accumulation_steps:
            return 0.0
        if self.reselection_rate_policy == "cosine":
            return self.initial_reselection_rate * (1 + math.cos(math.pi * step / total)) / 2
        if step == self.selection_accumulation_steps:
            return 1.0
        return self.initial_reselection_rate * (1 - step / total)

    # -- training ----------------------------------------------------------------------------------
    def param_groups(self, host: Host, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """The deltas, decaying to 0 by the method's own rate; then the run's groups of the rest."""
        deltas = self._deltas(host)
        mine = {delta.values for delta in deltas}
        rest = super().param_groups(host, lr, weight_decay)
        for group in rest:
            group["params"] = [p for p in group["params"] if p not in mine]
        groups = [
            {
                "params": [delta.values for delta in deltas],
                "deltas": deltas,
                "lr": lr,
                "weight_decay": self.weight_decay,
            },
            *rest,
        ]
        return [g for g in groups if g["params"]]

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Adam with ages, or SM3."""
        return AgedAdamW(groups) if self.growth == "ag" else SM3(groups)

    def before_step(self, host: Host, t: Step) -> None:
        """Watch the gradients that feed a choice."""
        if self.growth == "ma" or not self.watches(t.index + 1):
            return
        for delta in self._deltas(host):
            state = host.optimizer_state(delta.values)
            delta.watch = partial(_watch, state, delta, host.ranks)

    def after_backward(self, host: Host, t: Step) -> None:
        """Count what was watched as one sample."""
        for delta in self._deltas(host):
            delta.watch = None
            if self.growth == "ag":
                _take_sample(host.optimizer_state(delta.values), host.ranks)

    def after_step(self, host: Host, t: Step) -> None:
        """Choose anew where it is time to."""
        if not (rate := self.rate(t.index + 1, t.total)):
            return
        for delta in self._deltas(host):
            state = host.optimizer_state(delta.values)
            dropped = delta.values.detach().abs().argsort(stable=True)
            dropped = dropped[: int(len(dropped) * rate)]
            (_swap_by_gradient if self.growth == "ag" else _swap_by_moments)(delta, state, dropped)

    def hf_refuses(self, host: Host, name: str) -> str:
        """Peft's nearest, SHiRA, fixes the number of entries of every module."""
        return "peft's SHiRA has r * (d_in + d_out) entries in every module, SpIEL any number"


# -- SpIEL-AG: candidates, samples, and the swap ---------------------------------------------------
def _watch(state: dict[str, Any], delta: SparseDelta, ranks: Ranks, grad_W: Tensor) -> None:
    """Add a micro-batch to the step's gradient at the candidates; the first of a phase names them:
    the K largest entries, summed over the ranks.
    """
    flat = grad_W.detach().reshape(-1)
    if "candidates" not in state:
        whole = flat.clone() if ranks.size > 1 else flat
        ranks.sum_([whole])
        if not whole.isfinite().all():
            return
        chosen = whole.abs().topk(len(delta.values)).indices.to(delta.indices.dtype)
        state |= {"candidates": chosen, "samples": 0}
        state |= {"grad_sum": torch.zeros_like(delta.values, requires_grad=False)}
        state |= {"grad_square_sum": torch.zeros_like(state["grad_sum"])}
    grad = flat[state["candidates"]].float()
    state["grad"] = state["grad"] + grad if "grad" in state else grad


def _take_sample(state: dict[str, Any], ranks: Ranks) -> None:
    """Add the step's gradient to the sums."""
    grad = state.pop("grad", None)
    if grad is None:
        return
    ranks.sum_([grad])
    if not grad.isfinite().all():
        return
    state["grad_sum"] += grad
    state["grad_square_sum"] += grad**2
    state["samples"] += 1


@torch.no_grad()
def _swap_by_gradient(delta: SparseDelta, state: dict[str, Any], dropped: Tensor) -> None:
    """Put the candidates with the largest summed gradient in the place of `dropped` (D,), ordered
    by |value|. A candidate that is dropped at the same time stays as it is.
    """
    candidates, samples = state.pop("candidates", None), state.pop("samples", 0)
    if not samples or "age" not in state:  # no step was finite
        return
    total, squares = state.pop("grad_sum"), state.pop("grad_square_sum")
    old = delta.indices[dropped]
    kept = torch.ones_like(delta.indices, dtype=torch.bool)
    kept[dropped] = False
    free = ~torch.isin(candidates, delta.indices[kept])
    best = torch.where(free, total.abs(), -1.0).argsort(descending=True, stable=True)
    best = best[: min(len(dropped), int(free.sum()))]
    dropped = dropped[~torch.isin(old, candidates[best])]
    best = best[~torch.isin(candidates[best], old)]
    dropped = dropped[: len(best)]
    delta.indices[dropped] = candidates[best]
    delta.values[dropped] = 0.0
    seed_moments(state, dropped, total[best] / samples, squares[best] / samples, samples)


def seed_moments(
    state: dict[str, Any], places: Tensor, mean: Tensor, square: Tensor, age: int
) -> None:
    """Give Adam at `places` (D,) the moments that bias correction turns into `mean` and `square`
    (D,) after `age` steps.
    """
    b1, b2 = AgedAdamW.BETAS
    state["age"][places] = float(age)
    state["exp_avg"][places] = mean * (1 - b1**age)
    state["exp_avg_sq"][places] = square * (1 - b2**age)


# -- SpIEL-MA: the swap ----------------------------------------------------------------------------
@torch.no_grad()
def _swap_by_moments(delta: SparseDelta, state: dict[str, Any], dropped: Tensor) -> None:
    """Put the entries with the largest row times column statistic that are not trained yet in the
    place of `dropped` (D,).
    """
    if "row" not in state:  # no step was finite
        return
    grown = best_of_outer(state["row"], state["column"], delta.indices, len(dropped))
    dropped = dropped[: len(grown)]
    delta.indices[dropped] = grown.to(delta.indices.dtype)
    delta.values[dropped] = 0.0


def best_of_outer(row: Tensor, column: Tensor, taken: Tensor, d: int) -> Tensor:
    """Flat positions of the `d` largest entries of the outer product of `row` (O,) and `column`
    (I,), without those `taken`; some rows at a time, so that it never exists whole.
    """
    d_in, rows = len(column), max(AT_ONCE // len(column), 1)
    scores, places = row.new_empty(0), taken.new_empty(0, dtype=torch.int64)
    for first in range(0, len(row), rows):
        block = torch.outer(row[first : first + rows], column).view(-1)
        inside = taken[(taken >= first * d_in) & (taken < first * d_in + len(block))]
        block[inside - first * d_in] = -1.0  # below every score
        top = block.topk(min(d, len(block)))
        scores = torch.cat([scores, top.values])
        places = torch.cat([places, top.indices + first * d_in])
        scores, order = scores.topk(min(d, len(scores)))
        places = places[order]
    return places[scores >= 0]
