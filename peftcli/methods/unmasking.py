"""ID3 over the parameters of another method: which may be chosen, and their step-by-step unmasking.

    grad = mask * grad          mask, of every parameter's shape, grows from nothing to B entries

What is masked gets no gradient and does not decay, so it stays where the method started it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from peftcli.cards import find_method
from peftcli.errors import ConfigError
from peftcli.methods.sparse import Masks, budget_of

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.method import Method

FAMILIES = ("low-rank", "structured", "scale-shift", "adapter")  # train parameters of their own
Score = Callable[[Tensor, Callable[[], Tensor]], Tensor]  # (gradient, its weights) -> H


class Unmasked(Masks):
    """The masks of a method's parameters, and how many steps chose."""

    step: Tensor

    def __init__(self, masks: Mapping[str, Tensor], B: int) -> None:
        super().__init__(masks)
        self.B = B
        self.register_buffer("step", torch.tensor(0))  # optimizer steps taken: s


def method_over(name: str, options: Mapping[str, Any]) -> Method:
    """The method `name` of these options. Raises `ConfigError` where there is none, or where its
    parameters are not the adapter's own.
    """
    from peftcli.config import method_of  # reads this file's types

    card = find_method(name)
    try:
        made: Method = method_of({"_target_": card.target, **options})
    except ConfigError as e:
        raise ConfigError(f"method.over_options, for method.over={name}: {e}") from None
    if made.family not in FAMILIES:
        raise ConfigError(
            f"method.over={name}: it is {made.family}; what is unmasked are parameters of methods "
            f"that are {', '.join(FAMILIES)}."
        )
    return made


def mask_parameters(host: Host, budget: int | None, density: float) -> None:
    """Mask everything that trains but for modules that train whole."""
    whole = tuple(f"{path}." for path in host.saved_modules)
    trained = {n: p for n, p in host.trained().items() if not n.startswith(whole)}
    sizes = [p.numel() for p in trained.values()]
    B = budget_of(host, sizes, "budget", budget, density, targets="what method.over trains")
    masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in trained.items()}
    host.share(Unmasked(masks, B), training=True)


def masks_of(host: Host, method: Method) -> Unmasked:
    """The masks over the parameters of a method."""
    name = next(name for name, held in host.adapters.items() if held is method)
    return cast(Unmasked, host.shared(name, training=True))


@torch.no_grad()
def unmask(host: Host, masks: Unmasked, n: int, score: Score) -> None:
    """Unmask the `n` entries of the highest score among those that still are masked, and drop the
    gradients of the others. Nothing happens where a gradient is not finite: the loop takes no step.
    """
    parameters = [host.model.get_parameter(name) for name in masks.names]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if not all(g.isfinite().all() for g in grads):
        return
    if n := min(n, masks.B - sum(int(masks[name].sum()) for name in masks.names)):
        scores = [
            score(g.flatten(), p.flatten).masked_fill(masks[name].flatten(), -math.inf)
            for name, p, g in zip(masks.names, parameters, grads, strict=True)
        ]
        chosen = torch.zeros(sum(map(len, scores)), dtype=torch.bool, device=scores[0].device)
        chosen[first_largest(torch.cat(scores), n)] = True
        for name, new in zip(masks.names, chosen.split([len(H) for H in scores]), strict=True):
            masks[name].view(-1).logical_or_(new)
    for name, g in zip(masks.names, grads, strict=True):
        g *= masks[name]
    masks.step += 1


def first_largest(scores: Tensor, n: int) -> Tensor:
    """Ascending indices of the `n` largest scores (N,); of equal ones the first."""
    cut = scores.topk(n).values[-1]
    above = (scores > cut).nonzero().view(-1)
    equal = (scores == cut).nonzero().view(-1)[: n - len(above)]
    return torch.cat([above, equal]).sort().values
