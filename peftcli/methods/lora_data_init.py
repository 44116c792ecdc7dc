"""Where LoRA starts by a look at the data: `init=lora_ga`, `lora_one` and `eva` of `method=lora`.

    lora_ga      A, B = singular vectors of the gradient; W gives s B0 A0 away (Wang et al. 2024)
    lora_one     s B A = the best rank-r part of one gradient step  (Zhang et al. 2025)
    eva          A = the layer's leading inputs, B = 0, ranks by explained variance  (Paischer 2024)

The starts that need no data, and what the names mean, are in `lora_init.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftcli.core.principal import PrincipalInputs, leading, principal_inputs
from peftcli.core.scores import Calibration, mean_gradients
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.methods.lora_init import Start, from_rounding, init_of, rank_within

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.methods.lora import LoRA, LoRADelta


# -- from gradients --------------------------------------------------------------------------------
def lora_ga(method: LoRA, delta: LoRADelta, site: Site, G: Tensor) -> None:
    """A = c V[a]', B = c U[:, b] for the SVD of the mean gradient `G` (d_out, d_in) and two sets of
    its first 2r indices (`direction`); c by `ga_scale`, d_out^(1/4) / sqrt(gamma) in the paper.

    `ga_scale=peft` is what peft computes: B alone is scaled, by c and by its singular values, and
    `random` draws the same indices for both factors.
    """
    r = rank_within(delta, site, 2)
    U, S, Vh = leading(G, 2 * r)
    a, b = _directions(method, r)
    A, B = Vh[a], U[:, b]
    stable = site.d_out**0.25 / math.sqrt(method.gamma)
    if method.ga_scale == "peft":
        delta.start_from(stable * B * S[b], A)
        return
    if method.ga_scale == "weight_svd":
        c = (leading(site.weight.float(), r)[1] / delta.scale).sqrt().mean().item()
    else:
        c = {"stable": stable, "unit": 1.0, "gd_scale": 1 / delta.scale}[method.ga_scale]
    delta.start_from(c * B, c * A)


def _directions(method: LoRA, r: int) -> tuple[Tensor, Tensor]:
    """Indices of the r singular vectors for A and of those for B, among the first 2r."""
    i = torch.arange(2 * r)
    if method.direction == "random":
        i = torch.randperm(2 * r)
        return i[:r], i[:r] if method.ga_scale == "peft" else i[r:]
    return {
        "ArB2r": (i[:r], i[r:]),
        "A2rBr": (i[r:], i[:r]),
        "ArBr": (i[1::2], i[0::2]),
    }[method.direction]


@torch.no_grad()
def lora_one(method: LoRA, delta: LoRADelta, site: Site, G: Tensor) -> None:
    """s B A = -s / (gamma S_1) times the best rank-r part of the mean gradient `G` (d_out, d_in):
    W stays, so the output moves before the first step.
    """
    r = rank_within(delta, site)
    U, S, Vh = leading(-G, r)
    root = (S / S[0] / method.gamma).sqrt()
    delta.A.copy_(root[:, None] * Vh)
    delta.B.copy_(U * root)


def _from_gradients(method: LoRA, host: Host, sites: Sequence[Site], data: Calibration) -> Start:
    batches = method.init_batches or {"lora_ga": 64, "lora_one": 8}[method.init]
    gradients = mean_gradients(host.model, sites, data, batches)
    rule = lora_ga if method.init == "lora_ga" else lora_one
    return lambda delta, site: rule(method, delta, site, gradients.pop(site.name))


# -- from inputs -----------------------------------------------------------------------------------
def allot(ratios: Mapping[str, Tensor], kept: Mapping[str, int], budget: int) -> dict[str, int]:
    """Ranks by site: `budget` goes to the largest explained-variance ratios of all sites, of which
    each site enters with its first `kept`; of equals the earlier site wins.
    """
    entries = [(x, name) for name, all_ in ratios.items() for x in all_[: kept[name]].tolist()]
    best = sorted(entries, key=lambda entry: -entry[0])[:budget]
    return {name: sum(name == winner for _, winner in best) for name in ratios}


def _eva(method: LoRA, host: Host, sites: Sequence[Site], data: Calibration) -> tuple[LoRA, Start]:
    """The method with the ranks that the data allot, and a start at the principal inputs."""
    for site in sites:
        if site.kind != "linear":
            raise ConfigError(
                f"method.init=eva reads the inputs of linear layers; {site.path} is a {site.kind}. "
                "Leave it out of method.target_modules."
            )
    kept = {s.name: min(round(method.rho * method.rank(s)), s.d_in) for s in sites}
    budget = sum(method.rank(s) for s in sites)

    def ranks(found: Mapping[str, PrincipalInputs]) -> dict[str, int]:
        return allot({name: f.ratios for name, f in found.items()}, kept, budget)

    def converged(found: Mapping[str, PrincipalInputs]) -> bool:
        return all((found[n].similarity[:r] >= method.tau).all() for n, r in ranks(found).items())

    batches = method.init_batches or sys.maxsize
    found = principal_inputs(host, sites, data, batches, kept, converged)
    few = [name for name, r in kept.items() if len(found[name].ratios) < r]
    if few:
        raise ConfigError(
            f"method.init=eva: {few[0]} saw fewer than {kept[few[0]]} tokens; take more data, a "
            "larger method.init_batches, or a lower method.r."
        )
    allotted = ranks(found)

    @torch.no_grad()
    def start(delta: LoRADelta, site: Site) -> None:
        r = allotted[site.name]
        V, S = found[site.name].components[:r], found[site.name].S[:r]
        delta.A.copy_(V / S.sqrt()[:, None] if method.whiten else V)

    return method.with_ranks(sites, allotted, method.adjust_scaling), start


# -- all -------------------------------------------------------------------------------------------
def prepare(
    method: LoRA, host: Host, sites: Sequence[Site], data: Calibration | None
) -> tuple[LoRA, Start]:
    """`method` with its ranks settled, and what starts each of its deltas."""
    if method.init == "loftq":
        return method, from_rounding(method, host)
    if data is None:
        return method, init_of(method.init)
    if method.init == "eva":
        return _eva(method, host, sites, data)
    if method.init in ("lora_ga", "lora_one"):
        return method, _from_gradients(method, host, sites, data)
    return method, init_of(method.init)
