"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models. Ben
Zaken et al., ACL 2022, arXiv 2106.10199.

    y = W x + b        b (O,) trains, W is frozen

Biases alone, with the task's head, carry what small and medium tasks need: fine-tuning exposes what
the weights know already.

A bias is a parameter named `bias`, that of a norm too; T5's `relative_attention_bias` is a table
and none. A choice of terms also trains the bias of the pooler, as the authors' code does. For
models without biases `add_missing_bias` gives the linears zero ones: an extension, not the paper's.

The paper's control trains as many weights drawn at random (`random_entries`): if biases were
nothing special, these would do as well. Every matrix gets its share by size. Vectors, to which the
authors' split gives next to nothing, get none, and all positions differ, where the authors draw
with replacement. Of their other controls the head alone is `method=partial method.preset=head`, and
whole rows and columns are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.delta import OutputDelta
from peftcli.core.method import Method
from peftcli.core.site import Site
from peftcli.errors import ConfigError, NotApplicable
from peftcli.methods.selection import base_names, inside
from peftcli.methods.sparse import SparseDelta, random_positions

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class BiasDelta(OutputDelta):
    """y' = y + bias, where a linear has no bias of its own, or only some rows of it train."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.axis = weights.channel_axis(site.module)
        self.bias = nn.Parameter(torch.zeros(site.d_out))  # (O,), zero so that y' = y at the start

    def edit(self, y: Tensor, x: Tensor) -> Tensor:
        """The output and the bias."""
        return y + weights.along(self.bias, y, self.axis)

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """b' = b + bias."""
        return W, self.bias if b is None else b + self.bias


@dataclass(frozen=True)
class BitFit(Method):
    """Biases of the base, all or those of some components; or as many random weights."""

    family: ClassVar[str] = "selective"

    bias_terms: str | tuple[str, ...] = ("all",)
    add_missing_bias: bool = False
    random_entries: Literal["equal"] | Annotated[int, Ge(1)] | None = None

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Select the biases, graft one where it is missing or where only a part of it trains; or
        graft as many single weights.
        """
        if isinstance(self.random_entries, int):
            self._train_random(host, self.random_entries)
            return
        names, grafted = self._biases(host)
        if self.random_entries == "equal":
            mine = set(names) - set(inside(names, host.saved_modules))  # heads train anyway
            count = sum(host.model.get_parameter(name).numel() for name in mine)
            self._train_random(host, count + sum(site.d_out for site in grafted))
            return
        for site in grafted:
            host.graft(site, self.build(site))
        host.matched[host.building] = {"biases": len(names), "biases added": len(grafted)}
        host.select(names)

    def _biases(self, host: Host) -> tuple[list[str], list[Site]]:
        """Names of the biases that train whole, and the sites that get one beside their own."""
        terms = (self.bias_terms,) if isinstance(self.bias_terms, str) else self.bias_terms
        if "all" in terms:
            names = [n for n in base_names(host) if n.endswith(".bias")]
            sites = host.find("all-linear") if self.add_missing_bias else []
            grafted = [site for site in sites if not _has_bias(site.module)]
        else:
            sites = list({s.name: s for term in terms for s in _sites(host, term)}.values())
            names = [f"{s.path}.bias" for s in sites if s.rows is None and _has_bias(s.module)]
            grafted = [site for site in sites if self._is_grafted(site)]
        if not names and not grafted:
            raise NotApplicable(
                f"{type(host.model).__name__} has no bias among method.bias_terms="
                f"{','.join(terms)}: method.add_missing_bias=true gives its linears zero ones."
            )
        if "all" not in terms:
            poolers = [p for p, role in host.layout.names.items() if role == "pooler"]
            names += [n for n in inside(base_names(host), poolers) if n.endswith(".bias")]
        return names, grafted

    def _train_random(self, host: Host, count: int) -> None:
        """Graft `count` single weights, spread over the matrices of the base by their sizes."""
        found = [site for site in host.find(".*") if site.path not in host.saved_modules]
        sites = list({site.module.weight: site for site in reversed(found)}.values())[::-1]
        ends = list(accumulate(site.d_out * site.d_in for site in sites))
        if count > ends[-1]:
            raise ConfigError(
                f"method.random_entries={count}: {type(host.model).__name__} has {ends[-1]} "
                "weights in matrices."
            )
        taken = [0, *(count * end // ends[-1] for end in ends)]  # of all up to each matrix
        for site, (first, last) in zip(sites, pairwise(taken), strict=True):
            if last > first:
                host.graft(site, SparseDelta(site, random_positions(site, last - first)))
        host.matched[host.building] = {"random weights": count}

    def _is_grafted(self, site: Site) -> bool:
        """Whether a chosen site needs a bias beside its own: rows of a fused linear, or none."""
        if _has_bias(site.module):
            return site.rows is not None
        return self.add_missing_bias and site.kind != "norm"

    def build(self, site: Site) -> BiasDelta:
        """A zero bias."""
        return BiasDelta(site)


def _has_bias(module: nn.Module) -> bool:
    return getattr(module, "bias", None) is not None


def _sites(host: Host, term: str) -> list[Site]:
    """Norms and linears of a role, or whose paths end so."""
    norms = [site for site in host.places("norm") if site.pick({term: 1}, 0)]
    return norms or host.find(term)
