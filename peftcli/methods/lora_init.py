"""Where LoRA starts: the option `init` of `method=lora`. s is the delta's scale, W (O, I).

From nothing:
    default      A uniform in +-1/sqrt(I), B = 0 (Microsoft's code and peft)
    gaussian     A normal with deviation 1/r, B = 0 (the paper's text)
    orthogonal   B A = 0 with both factors alive: they use complementary rows of a rotation (peft)
From the weight:
    pissa        W = U S V': B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r'  (Meng et al. 2024);
                 pissa_niter_K: of a randomised SVD with K power iterations
    olora        W = Q R: B = Q_r, A = R_r  (Buyukakyuz 2024)
    loftq        B A close to (W - Q) / s, for a base stored as Q = quant(W)  (Li et al. 2024)
From the data: eva, lora_ga, lora_one, in `lora_data_init.py`, which also chooses among all.

PiSSA and OLoRA subtract s B0 A0 from W in their papers; here the delta does
(`LoRADelta.start_from`). LoftQ is for a base in bitsandbytes' 4 or 8 bits and needs the weights
that it was quantised from, which it reads from the model's folder. One round leaves the base alone;
further rounds quantise W - s B A anew, and only then is a base written. The factors absorb
1/sqrt(s), so that Q + s B A fits W for every s (peft fits Q + B A).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Predicate
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.site import Site
from peftcli.errors import ConfigError

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.methods.lora import LoRA, LoRADelta

DatalessInit = (
    Literal["default", "gaussian", "orthogonal", "pissa", "olora"]
    | Annotated[str, Predicate(re.compile(r"pissa_niter_[1-9]\d*").fullmatch)]  # pyright: ignore[reportArgumentType]
)
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
    r, W = rank_within(delta, site), site.weight.float()
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, q=r, niter=niter)
        Vh = V.T
    root = (S[:r] / delta.scale).sqrt()
    delta.start_from(U[:, :r] * root, root[:, None] * Vh[:r])


def _olora(delta: LoRADelta, site: Site) -> None:
    r = rank_within(delta, site)
    Q, R = torch.linalg.qr(site.weight.float())
    delta.start_from(Q[:, :r], R[:r])


def rank_within(delta: LoRADelta, site: Site, times: int = 1) -> int:
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


def from_rounding(method: LoRA, host: Host) -> Start:
    """On the base's own quantiser; with one round the base keeps its codes."""

    @torch.no_grad()
    def start(delta: LoRADelta, site: Site) -> None:
        W, module = _original(method, host, site), site.module

        def quantise(rest: Tensor) -> Tensor:
            if method.loftq_iter > 1:
                weights.requantise(module, rest)
            return site.weight.float()

        r = rank_within(delta, site)
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


# -- all that need no data -------------------------------------------------------------------------
def _reserved(delta: LoRADelta, site: Site) -> None:
    """A start whose values come from the adapter's file."""
    _default(delta, site)
    delta.start_from(delta.B, delta.A)


INITS: dict[str, Start] = {
    "default": _default,
    "gaussian": _gaussian,
    "orthogonal": _orthogonal,
    "pissa": _pissa,
    "olora": _olora,
    # without data, as an adapter is read: only the tensors' places matter
    "eva": _default,
    "lora_ga": _reserved,
    "lora_one": _default,
}


def init_of(name: str) -> Start:
    """The start that an option `init` means where there are no data."""
    if name.startswith("pissa_niter_"):
        niter = int(name.rpartition("_")[2])
        return lambda delta, site: _pissa(delta, site, niter)
    return INITS[name]
