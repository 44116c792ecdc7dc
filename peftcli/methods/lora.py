"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., ICLR 2022, arXiv 2106.09685.

    y = W x + b + s B A x        A (R, I), B (O, R), W frozen, s = alpha / r

The update that fine-tuning makes has a low intrinsic rank, so two thin factors suffice, and they
fold into W afterwards.

Variants: rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): s = alpha / sqrt(r), which keeps the size
of the update constant as r grows. LoRA+ (Hayou et al., ICML 2024, arXiv 2402.12354): B learns
`lr_ratio` times faster than A. PiSSA (Meng et al., NeurIPS 2024, arXiv 2404.02948) and OLoRA
(Buyukakyuz 2024, arXiv 2406.01775) start from the principal part of W.

PiSSA's and OLoRA's papers subtract s B0 A0 from W. Here W is never written: the delta is s (B A -
B0 A0) with the start kept in buffers. This is the same function, and the base stays the original
under every switch, merge and export.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from peftcli.core.delta import Delta, WeightDelta
from peftcli.core.graft import deltas_of
from peftcli.core.layer import Layer
from peftcli.core.method import Method
from peftcli.core.rows import RowsDelta
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.kernels.lora_linear import lora_linear

if TYPE_CHECKING:
    from peftcli.core.host import Host


class LoRADelta(WeightDelta):
    """dW = s B A  (Hu et al. 2022, eq. 3); with a start (B0, A0) that W contains already, dW = s (B
    A - B0 A0).
    """

    def __init__(self, site: Site, r: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        if r % site.groups:
            raise ConfigError(
                f"method.r={r} at {site.path}: must be divisible by the convolution's "
                f"{site.groups} groups."
            )
        self.scale, self.groups, self.dropout = scale, site.groups, dropout
        self.A = nn.Parameter(torch.empty(r, site.d_in))  # (R, I)
        self.B = nn.Parameter(
            torch.zeros(site.d_out, r // site.groups)
        )  # (O, R/groups), zero so dW = 0 at start
        self.register_buffer("A0", None)  # (R, I), where the start is a part of W
        self.register_buffer("B0", None)  # (O, R)

    def start_from(self, B: Tensor, A: Tensor) -> None:
        """Start at these factors of a part of W, which the delta then takes the place of."""
        with torch.no_grad():
            self.A.copy_(A)
            self.B.copy_(B)
        self.A0, self.B0 = self.A.detach().clone(), self.B.detach().clone()

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) of the whole change: [A; A0] and [B, -B0] where there is a start."""
        if self.A0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], 1)

    def delta(self, W: Tensor) -> Tensor:
        """s B A, block by block for a grouped convolution."""
        A, B = self.factors()
        blocks = B.view(self.groups, -1, B.shape[1]) @ A.view(
            self.groups, -1, A.shape[1]
        )  # (G, O/G, I)
        return self.scale * blocks.reshape(W.shape)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """W x + b + s B A drop(x); dropout acts on the branch alone, while training."""
        A, B = self.factors()
        if layer.is_plain and not (self.training and self.dropout):
            return lora_linear(x, layer.weight, layer.bias, A, B, self.scale)
        y = layer(x)
        if x.is_floating_point():
            x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        h = layer.linear(x, A.to(y.dtype))
        if not x.is_floating_point():  # ids of an embedding: what is dropped are the looked-up rows
            h = F.dropout(h, self.dropout, self.training)
        return y + self.scale * layer.mix(h, B.to(y.dtype))


def _default(delta: LoRADelta, site: Site, r: int) -> None:
    """A uniform in +-1/sqrt(I), B = 0; an embedding has A = 0, B normal, since one-hot inputs pick
    columns of A.
    """
    if site.kind == "embedding":
        nn.init.zeros_(delta.A)
        nn.init.normal_(delta.B)
    else:
        nn.init.kaiming_uniform_(delta.A, a=math.sqrt(5))


def _gaussian(delta: LoRADelta, site: Site, r: int) -> None:
    """A normal with deviation 1/r, B = 0 (the paper's text; its code and the default take the
    uniform).
    """
    nn.init.normal_(delta.A, std=1 / r)


def _pissa(delta: LoRADelta, site: Site, r: int, niter: int | None = None) -> None:
    """W = U S V': B = U_r sqrt(S_r / s), A = sqrt(S_r / s) V_r'; `niter` power iterations of a
    randomised SVD instead.
    """
    W = _weight_for_factors(site, r)
    if niter is None:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, q=r, niter=niter)
        Vh = V.T
    root = (S[:r] / delta.scale).sqrt()
    delta.start_from(U[:, :r] * root, root[:, None] * Vh[:r])


def _olora(delta: LoRADelta, site: Site, r: int) -> None:
    """W = Q R: B = Q_r, A = R_r."""
    Q, R = torch.linalg.qr(_weight_for_factors(site, r))
    delta.start_from(Q[:, :r], R[:r])


def _weight_for_factors(site: Site, r: int) -> Tensor:
    if site.groups > 1 or r > min(site.d_in, site.d_out):
        raise ConfigError(
            f"method.init needs r <= min(d_in, d_out) = {min(site.d_in, site.d_out)} and no "
            f"convolution groups at {site.path} (r={r}, groups={site.groups}). Lower method.r, or "
            "take method.init=default."
        )
    return site.weight.float()


INITS: dict[str, Callable[[LoRADelta, Site, int], None]] = {
    "default": _default,
    "gaussian": _gaussian,
    "pissa": _pissa,
    "pissa_niter_4": lambda delta, site, r: _pissa(delta, site, r, 4),
    "pissa_niter_16": lambda delta, site, r: _pissa(delta, site, r, 16),
    "olora": _olora,
}


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation of linear, convolution and embedding weights."""

    family: ClassVar[str] = "low-rank"
    peft_type: ClassVar[str | None] = "LORA"
    hf_fields: ClassVar[Mapping[str, str]] = {
        "r": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
        "use_rslora": "use_rslora",
    }
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        "fan_in_fan_out init_lora_weights rank_pattern alpha_pattern megatron_core loftq_config"
        " eva_config corda_config lora_ga_config qalora_group_size".split()
    )

    r: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | tuple[str, ...] = ("q", "v")
    use_rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Ge(1)]] = field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, Gt(0)]] = field(default_factory=dict)
    init: Literal["default", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora"] = (
        "default"
    )
    lr_ratio: Annotated[float, Gt(0)] | None = None
    embedding_lr: Annotated[float, Gt(0)] = 1e-6

    def rank(self, site: Site) -> int:
        """The site's rank."""
        return int(site.pick(self.rank_pattern, self.r))

    def scale(self, site: Site) -> float:
        """s = alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha, r = site.pick(self.alpha_pattern, self.alpha), self.rank(site)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def build(self, site: Site) -> LoRADelta:
        """A pair of factors for the site."""
        r = self.rank(site)
        delta = LoRADelta(site, r, self.scale(site), self.dropout)
        INITS[self.init](delta, site, r)
        return delta

    def param_groups(self, host: Host, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """With `lr_ratio`, the four groups of LoRA+: A and other matrices; B; vectors; factors of
        embeddings.
        """
        if self.lr_ratio is None:
            return super().param_groups(host, lr, weight_decay)
        mine = [(site, delta) for name in host.adapters for site, delta in host.deltas(name)]
        pairs = [(s, d) for s, d in mine if isinstance(d, LoRADelta)]
        embedding = {p for s, d in pairs if s.kind == "embedding" for p in (d.A, d.B)}
        B = {d.B for _, d in pairs} - embedding
        rest = [p for p in host.trained().values() if p not in embedding and p not in B]
        fast = lr * self.lr_ratio
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "lr": lr, "weight_decay": weight_decay},
            {
                "params": [d.B for _, d in pairs if d.B in B],
                "lr": fast,
                "weight_decay": weight_decay,
            },
            {"params": [p for p in rest if p.ndim < 2], "lr": fast, "weight_decay": 0.0},
            {
                "params": [p for p in host.trained().values() if p in embedding],
                "lr": self.embedding_lr,
                "weight_decay": weight_decay,
            },
        ]
        return [g for g in groups if g["params"]]

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_module(self, module: nn.Module, delta: Delta) -> dict[str, Tensor]:
        """(A, B) of the module's whole change as peft stores them; a convolution's are kernels."""
        A, B, _ = _whole(delta)
        if isinstance(module, nn.Embedding):
            return {"lora_embedding_A": A, "lora_embedding_B": B}
        if isinstance(module, _ConvNd):
            A = A.view(A.shape[0], -1, *module.kernel_size)
            B = B.view(*B.shape, *[1] * len(module.kernel_size))
        return {"lora_A.weight": A, "lora_B.weight": B}

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """Rank and alpha of every module as exported: fused roles and starts raise ranks."""
        paths = dict.fromkeys(site.path for site in host.sites[name])
        modules = {path: host.model.get_submodule(path) for path in paths}
        ranks, alphas = {}, {}
        for path, module in modules.items():
            A, _, scale = _whole(deltas_of(module)[name])
            ranks[path] = A.shape[0]
            alphas[path] = scale * (math.sqrt(A.shape[0]) if self.use_rslora else A.shape[0])
        r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
        return {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": {path: n for path, n in ranks.items() if n != r},
            "alpha_pattern": {path: n for path, n in alphas.items() if n != alpha},
            "bias": "none",
            "fan_in_fan_out": all(isinstance(m, Conv1D) for m in modules.values()),
            "init_lora_weights": True,
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Ranks and alphas of single modules. Raises ValueError for factors that were saved
        relative to a changed base.
        """
        if (init := config.get("init_lora_weights")) in ("pissa", "olora", "corda"):
            raise ValueError(
                f"saved relative to a changed base (init_lora_weights={init!r}); convert it in "
                "peft first (path_initial_model_for_weight_conversion)."
            )
        return {key: dict(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}


def _whole(delta: Delta) -> tuple[Tensor, Tensor, float]:
    """(A, B, s) of a module's whole change. The roles of a fused linear become one pair: B is zero
    on other rows.
    """
    if isinstance(delta, LoRADelta):
        return *delta.factors(), delta.scale
    assert isinstance(delta, RowsDelta), type(delta)
    parts = [(delta.index(role), *_whole(delta.part(role))) for role in delta.parts]
    scale, rank = parts[0][3], sum(A.shape[0] for _, A, _, _ in parts)
    B = parts[0][2].new_zeros(delta.d_out, rank)
    column = 0
    for index, A, part, s in parts:
        B[index, column : column + A.shape[0]] = part.detach() * (s / scale)
        column += A.shape[0]
    return torch.cat([A for _, A, _, _ in parts]), B, scale


def _commonest(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]
