"""Linears that read one input - q, k and v; gate and up - and are computed together, in one node,
when the first of them is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.delta import Delta
from peftcli.core.graft import active_of, bare_class, deltas_of
from peftcli.core.site import Site
from peftcli.models.roles import is_cross

TOGETHER = (("q", "k", "v"), ("gate", "up"))  # roles
Member = tuple[nn.Module, Any]  # a linear and its delta
Compute = Callable[[Tensor, Sequence[Member]], Sequence[Tensor]]


class Siblings:
    """The members' outputs for one input, handed out as the model calls each. Members that turn out
    to be called with different inputs are computed apart from then on.
    """

    def __init__(self, members: Sequence[Member], compute: Compute) -> None:
        self.members, self.compute = tuple(members), compute
        self.x: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}  # outputs by their places
        self.are_apart = False

    def output(self, x: Tensor, place: int) -> Tensor | None:
        """The output of the member at `place` for `x`; None where it must be computed alone."""
        if self.waiting and (x is not self.x or place not in self.waiting):
            self.waiting, self.x, self.are_apart = {}, None, True
        if self.are_apart:
            return None
        if not self.waiting:
            if not all(_is_alone(module, member) for module, member in self.members):
                return None
            self.waiting = dict(enumerate(self.compute(x, self.members)))
            self.x = x
        y = self.waiting.pop(place)
        if not self.waiting:
            self.x = None
        return y

    def __getstate__(self) -> dict[str, Any]:
        """Without what waits, for copies."""
        return {**self.__dict__, "x": None, "waiting": {}}


def _is_alone(module: nn.Module, delta: Delta) -> bool:
    """Whether the delta is all that is active on a frozen dense linear."""
    active = active_of(module)
    if len(active) != 1 or deltas_of(module)[active[0]] is not delta:
        return False
    return weights.is_plain(module, bare_class(module))


def families(sites: Iterable[Site]) -> list[list[Site]]:
    """Sites of linears that read one input, where there are several; cross-attention reads two."""
    found: dict[tuple[str, tuple[str, ...]], list[Site]] = {}
    for site in sites:
        parent = site.path.rpartition(".")[0]
        for roles in TOGETHER:
            is_query = site.role == "q" and is_cross(site.path)
            if site.role in roles and not site.rows and site.kind == "linear" and not is_query:
                found.setdefault((parent, roles), []).append(site)
    return [family for family in found.values() if len(family) > 1]
