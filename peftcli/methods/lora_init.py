"""Where LoRA starts: the option `init` of `method=lora`. s is the delta's scale, W (O, I).

From nothing:
    default      A uniform in +-1/sqrt(I), B = 0 (Microsoft's code and peft)
    gaussian     A normal with deviation 1/r, B = 0 (the paper's text)
    orthogonal   B A = 0 with both factors alive: they use complementary rows of a rotation (peft)
From the weight:
    pissa        W = U S V': B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r'  (Meng et al. 2024)
    olora        W = Q R: B = Q_r, A = R_r  (Buyukakyuz 2024)
    loftq        B A close to (W - Q) / s, for a base stored as Q = quant(W)  (Li et al. 2024)
From the data:
    eva          A = the layer's leading inputs, B = 0, ranks by explained variance  (Paischer 2024)
    lora_ga      A, B = singular vectors of the gradient  (Wang et al. 2024)
    lora_one     s B A = the best rank-r part of one gradient step  (Zhang et al. 2025)

PiSSA, OLoRA and LoRA-GA subtract s B0 A0 from W in their papers; here the delta does
(`LoRADelta.start_from`). LoftQ is for a base in bitsandbytes' 4 or 8 bits and needs the weights
that it was quantised from, which it reads from the model's folder. One round leaves the base alone;
further rounds quantise W - s B A anew, and only then is a base written. The factors absorb
1/sqrt(s), so that Q + s B A fits W for every s (peft fits Q + B A).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.principal import PrincipalInputs, leading, principal_inputs
from peftcli.core.scores import Calibration, mean_gradients
from peftcli.core.site import Site
from peftcli.errors import ConfigError

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.methods.lora import LoRA, LoRADelta

Start = Callable[["LoRADelta", Site], None]  # gives the factors of a fresh delta their values


# -- from nothing ----------------------------------------------------------------------------------
def _default(delta: LoRADelta, site: Site) -> None:
    """An embedding has A = 0, B normal, since its one-hot inputs pick columns of A."""
    if site.kind == "embedding":
        nn.init.zeros_(delta.A)
        nn.init.normal_(delta.B)
    else:
        nn.init.kaiming_uniform_(delta.A, a=math.sqrt(5))


def _gaussian(delta: LoRADelta, site: Site) -> None:
    nn.init.normal_(delta.A, std=1 / delta.A.shape[0])


@torch.no_grad()
def _orthogonal(delta: LoRADelta, site: Site) -> None:
    r = delta.A.shape[0]
    if r % 2 or site.groups > 1:
        raise ConfigError(
            f"method.init=orthogonal needs an even rank and no convolution groups; {site.path} has "
            f"r={r}, groups={site.groups}. Change method.r, or take method.init=default."
        )
    Q = torch.linalg.qr(torch.randn(r, r)).Q
    delta.A.copy_(Q[0::2].T @ torch.randn(r // 2, site.d_in) / 10)
    delta.B.copy_(torch.randn(site.d_out, r // 2) @ Q[1::2] / 10)


# -- from the weight -------------------------------------------------------------------------------
def _pissa(delta: LoRADelta, site: Site, niter: int | None = None) -> None:
    """`niter` power iterations of a randomised SVD in place of the exact one."""
    r, W = _rank_within(delta, site), site.weight.float()
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, q=r, niter=niter)
        Vh = V.T
    root = (S[:r] / delta.scale).sqrt()
    delta.start_from(U[:, :r] * root, root[:, None] * Vh[:r])


def _olora(delta: LoRADelta, site: Site) -> None:
    r = _rank_within(delta, site)
    Q, R = torch.linalg.qr(site.weight.float())
    delta.start_from(Q[:, :r], R[:r])


def _rank_within(delta: LoRADelta, site: Site, times: int = 1) -> int:
    """The rank r, where the site has `times` * r singular vectors; else ConfigError."""
    r, side = delta.A.shape[0], min(site.d_in, site.d_out)
    if site.groups > 1 or times * r > side:
        many = f"{times} * r" if times > 1 else "r"
        raise ConfigError(
            f"method.init needs {many} <= min(d_in, d_out) = {side} and no convolution groups at "
            f"{site.path} (r={r}, groups={site.groups}). Lower method.r, or take "
            "method.init=default."
        )
    return r


def loftq(
    W: Tensor, quantise: Callable[[Tensor], Tensor], r: int, scale: float, rounds: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, A, B) with Q + scale * B A close to `W` (O, I): Q = quantise(W - scale * B A) and the
    best rank-r part of W - Q take turns, starting at B A = 0.
    """
    rest = W
    for _ in range(rounds):
        Q = quantise(rest)
        U, S, Vh = torch.linalg.svd(W - Q, full_matrices=False)
        root = (S[:r] / scale).sqrt()
        B, A = U[:, :r] * root, root[:, None] * Vh[:r]
        rest = W - scale * B @ A
    return Q, A, B  # pyright: ignore[reportPossiblyUnboundVariable]  # rounds >= 1


def _loftq(method: LoRA, host: Host) -> Start:
    """On the base's own quantiser; with one round the base keeps its codes."""

    @torch.no_grad()
    def start(delta: LoRADelta, site: Site) -> None:
        W, module = _original(method, host, site), site.module

        def quantise(rest: Tensor) -> Tensor:
            if method.loftq_iter > 1:
                weights.requantise(module, rest)
            return site.weight.float()

        r = _rank_within(delta, site)
        _, A, B = loftq(W, quantise, r, delta.scale, method.loftq_iter)
        delta.A.copy_(A)
        delta.B.copy_(B)

    return start


def _original(method: LoRA, host: Host, site: Site) -> Tensor:
    """The weight (d_out, d_in) that the quantised module was made of, from the model's folder."""
    bits = weights.bits(site.module)
    if bits != method.loftq_bits or (site.rows and method.loftq_iter > 1):
        has = f"{bits} bits" if bits else "no quantised weight"
        raise ConfigError(
            f"method.init=loftq with loftq_bits={method.loftq_bits} needs a base in "
            f"{method.loftq_bits} bits; {site.path} has {has}. Quantise the base alike, set "
            "method.loftq_bits, or take method.init=pissa; parts of a fused linear take "
            "loftq_iter=1."
        )
    W = host.original_weight(site)
    if W is not None and (W - site.weight).norm() < 0.5 * W.norm():
        return W
    folder: Any = host.model.name_or_path
    raise ConfigError(
        f"method.init=loftq needs the weights that the base was quantised from; {folder}/*."
        f"safetensors does not hold {site.path}.weight as it was. Take a model that is quantised "
        "while it is loaded, or method.init=default."
    )


# -- from gradients --------------------------------------------------------------------------------
def lora_ga(method: LoRA, delta: LoRADelta, site: Site, G: Tensor) -> None:
    """A = c V[a]', B = c U[:, b] for the SVD of the mean gradient `G` (d_out, d_in) and two sets of
    its first 2r indices (`direction`); c by `ga_scale`, d_out^(1/4) / sqrt(gamma) in the paper.

    `ga_scale=peft` is what peft computes: B alone is scaled, by c and by its singular values, and
    `random` draws the same indices for both factors.
    """
    r = _rank_within(delta, site, 2)
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
    r = _rank_within(delta, site)
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
def _reserved(delta: LoRADelta, site: Site) -> None:
    """A start whose values come from the adapter's file."""
    _default(delta, site)
    delta.start_from(delta.B, delta.A)


INITS: dict[str, Start] = {
    "default": _default,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "pissa_niter_4": lambda delta, site: _pissa(delta, site, 4),
    "pissa_niter_16": lambda delta, site: _pissa(delta, site, 16),
    "olora": _olora,
    # without data, as an adapter is read: only the tensors' places matter
    "eva": _default,
    "lora_ga": _reserved,
    "lora_one": _default,
}


def prepare(
    method: LoRA, host: Host, sites: Sequence[Site], data: Calibration | None
) -> tuple[LoRA, Start]:
    """`method` with its ranks settled, and what starts each of its deltas."""
    if method.init == "loftq":
        return method, _loftq(method, host)
    if data is None:
        return method, INITS[method.init]
    if method.init == "eva":
        return _eva(method, host, sites, data)
    if method.init in ("lora_ga", "lora_one"):
        return method, _from_gradients(method, host, sites, data)
    return method, INITS[method.init]
