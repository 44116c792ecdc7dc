"""Where SPT's budget goes: sensitivities, their ranking over all tensors, and the prices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcli.core.scores import each_gradient
from peftcli.core.site import Site
from peftcli.errors import ConfigError

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

SIZES = 79  # numbers of most sensitive weights that are tried: the code's 0.02, 0.04 ... 1.58 M


@dataclass(frozen=True)
class Price:
    """A tensor costs `whole` from `trigger` sensitive numbers on, and else as many as they are."""

    whole: int
    trigger: float

    def of(self, n: int) -> int:
        """The cost with `n` sensitive numbers."""
        return self.whole if n >= self.trigger else n


def rank(scores: Sequence[Tensor], most: int) -> tuple[Tensor, Tensor]:
    """The `most` highest numbers of all tensors, highest first: (which tensor, flat position)."""
    tops = [s.flatten().topk(min(most, s.numel())) for s in scores]
    owner = torch.cat([torch.full((len(t.values),), i) for i, t in enumerate(tops)])
    order = torch.cat([t.values.cpu() for t in tops]).argsort(descending=True, stable=True)[:most]
    return owner[order], torch.cat([t.indices.cpu() for t in tops])[order]


def nearest(totals: Sequence[int], budget: int) -> int | None:
    """Where the total nearest the budget stands, the last of equally near ones; none above twice
    the budget is taken.
    """
    allowed = [i for i, total in enumerate(totals) if total <= 2 * budget]
    return min(allowed, key=lambda i: (abs(totals[i] - budget), -i), default=None)


def allocate(
    scores: Sequence[Tensor], prices: Sequence[Price], budget: int, step: int, fixed: int = 0
) -> list[Tensor | None]:
    """For every tensor the flat positions that train, or None where it is structured or whole;
    `fixed` more train in any case. Raises `ConfigError` where every total is above twice the
    budget.
    """
    owner, position = rank(scores, SIZES * step)
    totals = []
    for i in range(1, min(SIZES, math.ceil(len(owner) / step)) + 1):
        counts = owner[: i * step].bincount(minlength=len(prices)).tolist()
        totals.append(fixed + sum(price.of(n) for price, n in zip(prices, counts, strict=True)))
    chosen = nearest(totals, budget)
    if chosen is None:
        raise ConfigError(
            f"method.budget={budget}: the {step} most sensitive weights alone cost {totals[0]}, "
            "more than twice as much. Lower method.step, or raise method.budget."
        )
    size = (chosen + 1) * step
    found = [position[:size][owner[:size] == i] for i in range(len(prices))]
    return [None if len(f) >= p.trigger else f for f, p in zip(found, prices, strict=True)]


def sensitivities(
    host: Host, sites: Sequence[Site], vectors: Sequence[str], data: Calibration, batches: int
) -> list[Tensor]:
    """The sums of squared gradients over the batches, of the sites' weights and of the vectors."""
    named = {name: host.model.get_parameter(name) for name in vectors}
    sums = {s.name: torch.zeros(s.d_out, s.d_in, device=s.device) for s in sites}
    sums |= {n: torch.zeros_like(p, dtype=torch.float32) for n, p in named.items()}

    def add(name: str, grad: Tensor) -> None:
        sums[name] += grad.float() ** 2

    with _gradients(named, add):
        each_gradient(host.model, sites, data, batches, lambda site, G: add(site.name, G))
    return list(sums.values())


@contextmanager
def _gradients(named: Mapping[str, nn.Parameter], add: Any) -> Iterator[None]:
    """Show `add` the gradients of frozen parameters for the length of the block."""

    def show(name: str, p: Tensor) -> None:
        add(name, p.grad)
        p.grad = None

    handles = []
    for name, p in named.items():
        p.requires_grad_()
        handles.append(p.register_post_accumulate_grad_hook(lambda p, name=name: show(name, p)))
    try:
        yield
    finally:
        for handle, p in zip(handles, named.values(), strict=True):
            handle.remove()
            p.requires_grad_(False)
