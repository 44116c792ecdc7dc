"""Intrinsic dimension: all weights of a model move in a random subspace of d numbers.

"Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", Aghajanyan,
Zettlemoyer, Gupta, ACL 2021, arXiv 2012.13255; roots in Li et al. 2018 (1804.08838), and Le et al.
2013 for Fastfood.

    DID    theta_i = theta0_i + P_i v                 v (d,), one for all tensors i of D_i numbers
    SAID   theta_i = theta0_i + lambda_g(i) P_i v     one lambda a group g; v (d - groups,)
    P_i v = (S G Pi S B v_pad)[:D_i] / sqrt(D_i sum(G^2))      over L = 2^ceil(log2 D_i) entries

S is the Walsh-Hadamard transform, B random signs, Pi a permutation, G normal numbers: a random
projection that is never stored as a matrix (`fastfood.py`). The smallest d that reaches 90 % of
full fine-tuning measures how hard a task is for a model.

What is kept is v, lambda and the seed: signs, permutation and normal numbers come from a hash of
the seed and a tensor's name, whatever the order, process or device. A fresh head trains as it is
and is not counted. A group is a transformer block, and one for all that lies outside of them; the
authors' code counts each tensor, and two more numbers, one of them dead. `grad_scale=official`
gives the gradient of v that this code's transforms give, smaller by 1/L_i for tensor i. The
smallest d itself is found by a sweep over `method.d` beside a run of `method=full`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
from annotated_types import Ge
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.delta import Delta, NotMergeable
from peftcli.core.graft import is_own
from peftcli.core.layer import Layer
from peftcli.core.method import Method
from peftcli.core.site import Site, expression
from peftcli.errors import ConfigError
from peftcli.methods.fastfood import Dense, Fastfood
from peftcli.train.streams import generator

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class Subspace(nn.Module):
    """What trains: v (d,) for all tensors and, for SAID, lambda (groups,)."""

    def __init__(self, d: int, groups: int | None) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(d))
        self.scales = None if groups is None else nn.Parameter(torch.ones(groups))


class _ShrunkGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, by: float) -> Tensor:
        ctx.by = by
        return v.view_as(v)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] / ctx.by, None


class IntrinsicDelta(Delta):
    """A module's own parameters moved by lambda P v   (Aghajanyan et al. 2021, eq. 3, 4)."""

    def __init__(
        self,
        shared: Subspace,
        groups: Mapping[str, int],
        projections: Mapping[str, nn.Module],
        official: bool,
    ) -> None:
        super().__init__()
        self.shared = (shared,)  # a tuple: its parameters belong to the model, once
        self.groups, self.official = dict(groups), official
        self.projections = nn.ModuleDict(projections)  # by the parameter's name in the module

    def update(self, name: str) -> Tensor:
        """lambda P v, flat."""
        (shared,) = self.shared
        P, v = cast(Any, self.projections[name]), shared.v
        if self.official:
            v = cast(Tensor, _ShrunkGradient.apply(v, P.gradient_shrinks))
        u = P(v)
        return u if shared.scales is None else shared.scales[self.groups[name]] * u

    def moved(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's parameters by name as they are now; sums are made in float32."""
        found = {}
        for name in self.projections:
            theta = cast(Tensor, module._parameters[name])
            u = self.update(name).view(theta.shape)
            found[name] = (theta.to(u.dtype) + u).to(theta.dtype)
        return found

    def forward(self, x: Any, layer: Layer) -> Any:
        """The layer with its parameters moved."""
        device = next(iter(layer.module.parameters())).device
        with torch.autocast(device.type, enabled=False):
            moved = self.moved(layer.module)
        with standing_in(layer.module, moved):
            return layer(x)

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Not of one layer: tied weights and parameters of all names move together."""
        raise NotMergeable("a subspace of all weights does not fold into a single layer's weight")


@contextmanager
def standing_in(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Within, the module's own parameters of these names are these tensors."""
    held = {name: module._parameters[name] for name in tensors}
    module._parameters.update(cast(Any, tensors))
    try:
        yield
    finally:
        module._parameters.update(held)


@dataclass(frozen=True)
class IntrinsicDimension(Method):
    """d numbers move every weight of the model."""

    family: ClassVar[str] = "sparse"
    size_option: ClassVar[str | None] = "d"
    trains_base: ClassVar[bool] = True
    on_quantised: ClassVar[bool] = False

    d: Annotated[int, Ge(1)] = 1000
    said: bool = True
    said_group: Literal["layer", "tensor"] = "layer"
    projection: Literal["fastfood", "dense"] = "fastfood"
    filter: str = ".*"
    grad_scale: Literal["exact", "official"] = "exact"
    seed: Annotated[int, Ge(0)] = 0

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """A delta on every module with weights of its own that the filter finds."""
        named = self._parameters(host)
        groups = self._groups(host, named)
        d = self._numbers_of_v(len(set(groups.values())))
        shared = Subspace(d, len(set(groups.values())) if self.said else None)
        host.share(shared.to(next(iter(named.values())).device))
        host.matched[host.building]["all weights"] = len(named)
        names = {p: name for name, p in named.items()}  # of tied weights the first
        drawn = {name: self._projection(name, p, d) for name, p in named.items()}
        for path, module in list(host.model.named_modules()):
            own = {n: names[p] for n, p in module.named_parameters(recurse=False) if p in names}
            if own and not is_own(path):
                delta = IntrinsicDelta(
                    shared,
                    {n: groups[name] for n, name in own.items()},
                    {n: drawn[name] for n, name in own.items()},
                    self.grad_scale == "official",
                )
                layer = host.layout.block_of(path)
                host.graft(Site(path, module, "weights", 0, 0, layer=layer), delta)

    def _parameters(self, host: Host) -> dict[str, nn.Parameter]:
        """What moves, by name, tied weights once; not what trains as it is."""
        if any(weights.is_quantised(m) for m in host.model.modules()):
            raise ConfigError(
                "method=intrinsic_dimension moves every weight, and weights in few bits cannot "
                "be moved by little. Use quantization=none."
            )
        moves = expression("method.filter", self.filter)
        direct = re.compile("|".join(rf"(.*\.)?{re.escape(m)}\..*" for m in self.modules_to_save))
        found = {
            name: p
            for name, p in host.model.named_parameters()
            if p.is_floating_point()
            and not (p.requires_grad or is_own(name) or direct.fullmatch(name))
            and moves.search(name)
        }
        if not found:
            raise ConfigError(f"method.filter={self.filter!r} is found in no parameter's name.")
        return found

    def _groups(self, host: Host, names: Iterable[str]) -> dict[str, int]:
        """The number of every parameter's group, in the model's order."""
        keys = {
            name: name if self.said_group == "tensor" else host.layout.block_path_of(name) or ""
            for name in names
        }
        order = list(dict.fromkeys(keys.values()))
        return {name: order.index(key) for name, key in keys.items()}

    def _numbers_of_v(self, num_groups: int) -> int:
        """d, less one for each group in SAID."""
        d = self.d - num_groups if self.said else self.d
        if d < 1:
            raise ConfigError(
                f"method.d={self.d}: SAID needs more than one number for each of its {num_groups} "
                "groups. Raise method.d, or take method.said_group=layer or method.said=false."
            )
        return d

    def _projection(self, name: str, p: nn.Parameter, d: int) -> nn.Module:
        if p.is_meta:
            return nn.Identity()  # a model without weights is counted, not moved
        D, draw = p.numel(), generator(self.seed, name)
        return Fastfood(D, d, draw) if self.projection == "fastfood" else Dense(D, d, draw)

    @torch.no_grad()
    def before_merge(self, host: Host, name: str) -> None:
        """Write every moved weight where it belongs, and take the deltas off."""
        moved = [
            (site.module, cast(IntrinsicDelta, delta).moved(site.module))
            for site, delta in host.deltas(name)
        ]
        for module, tensors in moved:  # tied weights are written twice, with the same numbers
            for own, tensor in tensors.items():
                module.get_parameter(own).copy_(tensor)
        host.remove(name)
