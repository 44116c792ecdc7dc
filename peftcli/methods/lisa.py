"""LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning. Pan et
al., NeurIPS 2024, arXiv 2403.17919.

    theta' = theta - lr * AdamW(grad)   for embeddings, norm, head, and gamma blocks drawn anew
                                        every K steps

LoRA moves the outermost layers most; so these always train, and of the blocks between only a few at
a time, whole and in full rank. Gradients and optimizer state are those of a few blocks.

The draw of a period is a function of (seed, period) alone, the same on every rank and after a
restart. The first preprint's algorithm box draws every block on its own with probability gamma / L
(`sampling=bernoulli`); the released code and later versions draw exactly gamma. The optimizer
forgets blocks that leave (`state=drop`), which the memory claim needs; the released code keeps
their state (`keep`). A block that is drawn twice in a row has not left. What is outside of the
blocks trains always, or a part of it (`always_on`). The authors' use on parameters of a diffusion
U-Net, which has no such blocks, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from annotated_types import Ge

from peftcli.core.method import Method, Step
from peftcli.errors import NotApplicable
from peftcli.methods.selection import base_names, inside, switch
from peftcli.train.streams import generator

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

Outside = Literal["embed", "norm", "head"]  # of the blocks


@dataclass(frozen=True)
class LISA(Method):
    """What is outside of the blocks, and a few blocks at a time."""

    family: ClassVar[str] = "selective"
    trains_base: ClassVar[bool] = True
    publishes_model: ClassVar[bool] = True
    on_quantised: ClassVar[bool] = False

    gamma: Annotated[int, Ge(1)] = 2
    interval_steps: Annotated[int, Ge(1)] = 20
    sampling: Literal["exact", "bernoulli"] = "exact"
    state: Literal["drop", "keep"] = "drop"
    always_on: tuple[Outside, ...] = ("embed", "norm", "head")
    seed: int = 0

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Select every weight that trains at some time: over a run, every block."""
        num_blocks = len(host.layout.blocks)
        if num_blocks < self.gamma:
            raise NotApplicable(
                f"{type(host.model).__name__} has {num_blocks} blocks: method.gamma={self.gamma} "
                "of them cannot be drawn, take fewer."
            )
        every = base_names(host).values()
        names = {*inside(every, host.layout.blocks), *_outside(host, self.always_on)}
        host.matched[host.building] = {"weights": len(names)}
        host.select(names)

    def before_step(self, host: Host, t: Step) -> None:
        """Exactly the blocks of the step's period train."""
        names = inside(base_names(host), host.layout.blocks)
        active = set(inside(names, self.drawn(host, t.index // self.interval_steps)))
        switch(host, names, active, forget=self.state == "drop")

    def drawn(self, host: Host, period: int) -> list[str]:
        """Paths of the blocks that train in a period."""
        blocks, random = host.layout.blocks, generator(self.seed, f"lisa/{period}")
        if self.sampling == "exact":
            chosen = torch.randperm(len(blocks), generator=random)[: self.gamma].tolist()
        else:
            chance = torch.rand(len(blocks), generator=random)
            chosen = (chance < self.gamma / len(blocks)).nonzero()[:, 0].tolist()
        return [blocks[i] for i in sorted(chosen)]


def _outside(host: Host, parts: tuple[Outside, ...]) -> set[str]:
    """Parameters of these parts: tables and whatever comes before the blocks (`embed`), norms
    behind them (`norm`), and the rest (`head`).
    """
    names = list(base_names(host).values())
    within = set(inside(names, host.layout.blocks))
    first = min(names.index(name) for name in within)
    found = set()
    for name in set(names) - within:
        role = host.layout.role_of(name.rpartition(".")[0])
        early = role in ("embed", "position") or names.index(name) < first
        part = "embed" if early else "norm" if role == "norm" else "head"
        found |= {name} if part in parts else set()
    return found
