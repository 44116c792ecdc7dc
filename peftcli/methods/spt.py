"""SPT: Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning. He et al., ICCV 2023, arXiv
2303.08566.

    y = W x + b + path(B A drop(x))                  a matrix with many sensitive weights
    y = W' x + b,  W' = W + single weights           a matrix with few; none is left alone

Weights are ranked by their squared gradients on the task, and a budget goes where they are
sensitive: matrices in which many are get a whole low-rank update (or an adapter, which needs no
more numbers), others train just those weights. Vectors (biases and norms) train whole or singly.

With n of a tensor's weights among the most sensitive, a matrix is structured where n >= c / alpha,
c the cost of its update, and a vector of length l trains whole where n >= l / beta. The number of
most sensitive weights is the one of 79 multiples of `step` whose total cost is nearest the budget.
The total jumps where a tensor passes its threshold, so it may miss the budget by some.

Where the update is an adapter (`structured=adapter`) it stands behind the linear, y = h + path(U
gelu(D drop(h) + d) + u); at the attention's output it stands beside it, and reads x undropped.

Departures from the official code: every linear draws its own dropout mask, also q, k and v; single
weights and vectors do not decay; batches are those of the run, where the scripts have 16 of 32.
As the code does, the gradient of a batch's mean is squared; the paper sums over single examples.
Vectors train in place under a mask, so they stay when the adapter is switched off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from peftcli.core.delta import Delta, OutputDelta
from peftcli.core.layer import Layer
from peftcli.core.method import Method, Step
from peftcli.core.site import Site
from peftcli.errors import ConfigError, NotApplicable, did_you_mean
from peftcli.methods.adapter import Bottleneck, projections
from peftcli.methods.lora import LoRADelta
from peftcli.methods.sparse import Masks, SparseDelta
from peftcli.methods.spt_allocation import Price, allocate, sensitivities

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

WHOLE = 0  # in an allocation: a structured matrix or a whole vector


class PathLoRADelta(LoRADelta):
    """dW = B A, left out for single examples while it trains (stochastic depth)."""

    def __init__(self, site: Site, r: int, dropout: float, drop_path: float) -> None:
        super().__init__(site, r, 1.0, dropout)
        self.drop_path = drop_path
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """W x + b + path(B A drop(x))."""
        if not (self.training and self.drop_path):
            return super().forward(x, layer)
        y = layer(x)
        h = layer.linear(F.dropout(x.to(y.dtype), self.dropout), self.A.to(y.dtype))
        keep = y.new_empty(len(y), *[1] * (y.ndim - 1)).bernoulli_(1 - self.drop_path)
        return y + layer.mix(h, self.B.to(y.dtype)) * keep / (1 - self.drop_path)


class SPTAdapterDelta(OutputDelta):
    """y' = y + core(drop(y)), or y + core(x) beside the attention's output."""

    def __init__(self, site: Site, r: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.beside, self.dropout = site.role == "o", dropout
        down, up = projections(site.d_in if self.beside else site.d_out, r, "lora", site.d_out)
        down.reset_parameters()  # the code keeps torch's start of the bias too
        self.core = Bottleneck(site.d_out, down, up, "gelu", drop_path=drop_path)

    def edit(self, y: Tensor, x: Tensor) -> Tensor:
        """The output and what the adapter adds."""
        if self.beside:
            return y + self.core(x.to(y.dtype))
        return y + self.core(F.dropout(y, self.dropout, self.training))


@dataclass(frozen=True)
class SPT(Method):
    """Low-rank updates or adapters, single weights and vectors, where the task is sensitive.

    `allocation` is what the data decided: for every tensor that trains the number of its weights
    that do, 0 where it is structured or whole. It is in the adapter's file; {} asks the data.
    """

    family: ClassVar[str] = "sparse"

    structured: Literal["lora", "adapter"] = "lora"
    budget: Annotated[int, Ge(1)] = 400_000
    step: Annotated[int, Ge(1)] = 20_000
    r: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 10.0
    beta: Annotated[float, Gt(0)] = 5.0
    structured_vector: bool = True
    batches: Annotated[int, Ge(1)] = 16
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    drop_path: Annotated[float, Ge(0), Lt(1)] = 0.1
    target_modules: str | tuple[str, ...] = "all-linear"
    allocation: dict[str, Annotated[int, Ge(0)]] = field(default_factory=dict)

    @property
    def num_chosen(self) -> int | None:
        """The budget, which the total may miss by some; None where the allocation is known."""
        return None if self.allocation else self.budget

    def price(self, site: Site) -> Price:
        """Of a matrix: both factors, or the adapter with its biases."""
        cost = self.r * (site.d_in + site.d_out)
        if self.structured == "adapter":
            width = site.d_in if site.role == "o" else site.d_out
            cost = self.r * (width + site.d_out) + self.r + site.d_out
        return Price(cost, cost / self.alpha)

    def vector_price(self, length: int) -> Price:
        """Of a vector."""
        return Price(length, length / self.beta if self.structured_vector else math.inf)

    def build(self, site: Site) -> Delta:
        """The structured update of a matrix; none is dropped out before the attention's output."""
        dropout = 0.0 if site.role == "o" else self.dropout
        cls = PathLoRADelta if self.structured == "lora" else SPTAdapterDelta
        return cls(site, self.r, dropout, self.drop_path)

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Rank, allocate, graft the deltas, and select the vectors and the class token."""
        sites = [site for site in host.find(self.target_modules) if site.kind == "linear"]
        if not sites:
            raise NotApplicable(
                f"method.target_modules has no linear of {type(host.model).__name__}; take "
                "all-linear on a transformer."
            )
        vectors = _vectors(host, sites)
        chosen = (
            self._read([*(site.name for site in sites), *vectors])
            if self.allocation
            else self._choose(host, sites, vectors, data)
        )
        for site in sites:
            positions = chosen.get(site.name, torch.empty(0))
            if positions is None:
                host.graft(site, self.build(site))
            elif len(positions):
                host.graft(site, SparseDelta(site, positions.sort().values))
        masks = {name: _mask(host, name, chosen[name]) for name in vectors if name in chosen}
        host.share(Masks(masks))
        host.select([*masks, *_class_tokens(host)])

    def _choose(
        self, host: Host, sites: list[Site], vectors: list[str], data: Calibration | None
    ) -> dict[str, Tensor | None]:
        """By name the positions that train, or None for all; nothing of what is left alone."""
        lengths = [host.model.get_parameter(name).numel() for name in vectors]
        if data is None:
            raise ConfigError(
                "method=spt trains what the task's gradients choose, and there are no data to ask; "
                "give a model with weights and data, or name what trains in method.allocation."
            )
        scores = sensitivities(host, sites, vectors, data, self.batches)
        prices = [*map(self.price, sites), *map(self.vector_price, lengths)]
        tokens = sum(host.model.get_parameter(name).numel() for name in _class_tokens(host))
        found = allocate(scores, prices, self.budget, self.step, tokens)
        names = [*(site.name for site in sites), *vectors]
        return {n: f for n, f in zip(names, found, strict=True) if f is None or len(f)}

    def _read(self, names: Sequence[str]) -> dict[str, Tensor | None]:
        """Shapes alone: the positions themselves come from the file."""
        if wrong := [name for name in self.allocation if name not in names]:
            raise ConfigError(
                f"method.allocation: {wrong[0]} is none of the tensors that may train, such as "
                f"{', '.join(list(names)[:2])}.{did_you_mean(wrong[0], names)}"
            )
        return {n: None if k == WHOLE else torch.arange(k) for n, k in self.allocation.items()}

    def published(self, host: Host, name: str) -> SPT:
        """With the allocation written out."""
        deltas = {
            site.name: len(delta.values) if isinstance(delta, SparseDelta) else WHOLE
            for site, delta in host.deltas(name)
        }
        masks = _masks(host, name)
        counts = {n: WHOLE if masks[n].all() else int(masks[n].sum()) for n in masks.names}
        return replace(self, allocation={**deltas, **counts})

    def after_backward(self, host: Host, t: Step) -> None:
        """Let nothing of a vector change but what was chosen."""
        for name in (n for n, method in host.adapters.items() if method is self):
            masks = _masks(host, name)
            for vector in masks.names:
                if (grad := host.model.get_parameter(vector).grad) is not None:
                    grad *= masks[vector]

    def hf_refuses(self, host: Host, name: str) -> str:
        """Peft's adapters are of one kind each."""
        return "peft has no adapter of low-rank updates, single weights and vectors together"


def _vectors(host: Host, sites: Sequence[Site]) -> list[str]:
    """Biases of the sites and vectors of norms, by name, without those that train anyway."""
    modules = {site.path: site.module for site in [*sites, *host.places("norm")]}
    return [
        f"{path}.{name}"
        for path, module in modules.items()
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 1 and p.is_floating_point() and not p.requires_grad
    ]


def _class_tokens(host: Host) -> list[str]:
    return [n for n, _ in host.model.named_parameters() if n.endswith("cls_token")]


def _mask(host: Host, name: str, positions: Tensor | None) -> Tensor:
    mask = torch.zeros_like(host.model.get_parameter(name), dtype=torch.bool)
    mask[... if positions is None else positions.to(mask.device)] = True
    return mask


def _masks(host: Host, name: str) -> Masks:
    held = host.shared(name)
    assert isinstance(held, Masks)
    return held
