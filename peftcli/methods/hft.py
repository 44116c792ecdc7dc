"""HFT: Half Fine-Tuning for Large Language Models. Hui et al., ACL 2025, arXiv 2404.18466.

    theta' = theta - lr * M * update        M drawn per tensor, half of each category of each block

In every stage of fine-tuning a random half of the matrices rests, of every kind in every block, so
that what the model knew stays in that half; the next stage draws another.

There is no official code. Of a block's four attention matrices two train, of its two norms one; of
the three matrices of its feed-forward part two train in half of the blocks and one in the others.
A bias goes with its weight, a fused linear counts as one matrix, a bank of experts as one tensor of
the feed-forward part. The paper leaves open what embeddings, head and final norm do; here they
train (`embed_head`). The paper draws once a stage: `stage` numbers it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from peftcli.core.graft import is_own
from peftcli.core.method import Method, Step
from peftcli.errors import NotApplicable
from peftcli.methods.selection import base_names, inside, switch
from peftcli.train.streams import generator

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

KINDS = {  # category: roles of its modules
    "attention": ("q", "k", "v", "o", "qkv", "pos_q", "pos_k"),
    "ffn": ("gate", "up", "down", "gate_up", "experts"),
    "norm": ("norm",),
}
Unit = tuple[str, ...]  # names of parameters that train or rest together


@dataclass(frozen=True)
class HFT(Method):
    """A random half of the base's tensors trains."""

    family: ClassVar[str] = "selective"
    trains_base: ClassVar[bool] = True
    on_quantised: ClassVar[bool] = False

    ratio: Annotated[float, Gt(0), Le(1)] = 0.5
    granularity: Literal["category", "layer", "model"] = "category"
    resample: Literal["stage", "epoch", "steps"] = "stage"
    resample_steps: Annotated[int, Ge(1)] = 1000
    embed_head: Literal["frozen", "trained", "half"] = "trained"
    seed: int = 0
    stage: Annotated[int, Ge(0)] = 0

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Select the stage's half; with a new draw every so often, all that may ever train."""
        if not host.layout.blocks:
            raise NotApplicable(f"{type(host.model).__name__} has no blocks: take method=full.")
        names = self.drawn(host, 0) if self.resample == "stage" else self._candidates(host)
        host.matched[host.building] = {"tensors": len(names)}
        host.select(names)

    def before_step(self, host: Host, t: Step) -> None:
        """A new half at the start of every period."""
        if self.resample == "stage":
            return
        period = int(t.epoch) if self.resample == "epoch" else t.index // self.resample_steps
        switch(host, self._candidates(host), self.drawn(host, period))

    def drawn(self, host: Host, period: int) -> set[str]:
        """The names that train in a period: a pure function of seed, stage and period."""
        random = generator(self.seed, f"hft/{self.stage}/{period}")
        units = [u for sets in self._kinds(host) for u in _pick(sets, self.ratio, random)]
        names = {name for unit in units for name in unit}
        if self.embed_head == "frozen":
            return names
        outside = _outside(host)
        if self.embed_head == "half" and self.ratio < 1:
            ends = sorted({n for role in ("embed", "head") for n in _of_role(host, role)})
            kept = _pick([[(n,) for n in ends]], 0.5, random)
            outside = [n for n in outside if n not in ends or (n,) in kept]
        return names | set(outside)

    def _kinds(self, host: Host) -> list[list[list[Unit]]]:
        """For every kind of tensor its sets, all of one size, from each of which a share trains."""
        units = {block: list(_units(host, block)) for block in host.layout.blocks}
        if self.granularity == "model":
            return [[[unit for held in units.values() for _, unit in held]]]
        if self.granularity == "layer":
            return [[[tuple(n for _, unit in held for n in unit) for held in units.values()]]]
        sets: dict[tuple[str, str], list[Unit]] = {}
        for held in units.values():
            for kind, unit in held:
                sets.setdefault(kind, []).append(unit)
        kinds: dict[tuple[str, int], list[list[Unit]]] = {}
        for (kind, _), members in sets.items():
            kinds.setdefault((kind, len(members)), []).append(members)
        return list(kinds.values())

    def _candidates(self, host: Host) -> list[str]:
        """Everything that may train in some period."""
        outside = [] if self.embed_head == "frozen" else _outside(host)
        return [n for block in host.layout.blocks for _, u in _units(host, block) for n in u] + (
            outside
        )


def _pick(sets: list[list[Unit]], ratio: float, random: torch.Generator) -> list[Unit]:
    """A share of every set. Where it is no whole number, some sets give one more than others, so
    that the share is right over all of them.
    """
    share = round(ratio * len(sets[0]), 9)
    low = math.floor(share)
    more = (share - low) * len(sets) + torch.rand((), generator=random).item()
    raised = torch.randperm(len(sets), generator=random)[: math.floor(more)].tolist()
    picked = []
    for i, units in enumerate(sets):
        order = torch.randperm(len(units), generator=random)[: low + (i in raised)]
        picked += [units[j] for j in order.tolist()]
    return picked


def _units(host: Host, block: str) -> Iterator[tuple[tuple[str, str], Unit]]:
    """((kind, place), names) of everything in a block that trains or rests as one."""
    for path, module in host.model.get_submodule(block).named_modules(prefix=block):
        names = [f"{path}.{n}" for n, _ in module.named_parameters(recurse=False)]
        role = host.layout.role_of(path) or ""
        if is_own(path) or not names:
            continue
        kind = next((k for k, roles in KINDS.items() if role in roles), "other")
        place = next((p for p in _attentions(host, block) if path.startswith(f"{p}.")), "")
        where = (kind, place if kind == "attention" else block)
        for unit in [(n,) for n in names] if role == "experts" else [tuple(names)]:
            yield where, unit


def _attentions(host: Host, block: str) -> list[str]:
    """The block's attention modules, outer before inner."""
    names = host.layout.names
    return [p for p, role in names.items() if role == "attention" and p.startswith(f"{block}.")]


def _outside(host: Host) -> list[str]:
    """Parameters outside of the blocks: embeddings, final norm, head."""
    names = dict.fromkeys(base_names(host).values())
    within = set(inside(names, host.layout.blocks))
    return [n for n in names if n not in within]


def _of_role(host: Host, role: str) -> list[str]:
    """Parameters of the modules of a role, under the names that they train under."""
    paths = [p for p, r in host.layout.names.items() if r == role]
    first = base_names(host)
    return [first[n] for n in inside(first, paths)]


@torch.no_grad()
def half_reset(host: Host, base: nn.Module, seed: int) -> list[str]:
    """theta = M theta_tuned + (1 - M) theta_base, M one draw of a half of each category of each
    block: how much of what fine-tuning covered comes back (the paper's analysis). What is outside
    of the blocks stays tuned. Returns the names of what was put back.
    """
    kept, held = HFT(seed=seed).drawn(host, 0), dict(base.named_parameters())
    tuned = {n: p for n, p in host.model.named_parameters() if not is_own(n)}
    back = [name for name in tuned if name not in kept]
    for name in back:
        tuned[name].copy_(held.get(name, torch.zeros_like(tuned[name])))  # merging added a bias
    return back
