"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., ICLR 2022, arXiv 2106.09685.

    y = W x + b + s B A x        A (R, I), B (O, R), W frozen, s = alpha / r

The update that fine-tuning makes has a low intrinsic rank, so two thin factors suffice, and they
fold into W afterwards.

Variants: rsLoRA (Kalajdzievski 2023, arXiv 2312.03732): s = alpha / sqrt(r), which keeps the size
of the update constant as r grows. LoRA+ (Hayou et al., ICML 2024, arXiv 2402.12354): B learns
`lr_ratio` times faster than A. PiSSA (Meng et al., NeurIPS 2024, arXiv 2404.02948), OLoRA
(Buyukakyuz 2024, arXiv 2406.01775), LoftQ (Li et al., ICLR 2024, arXiv 2310.08659), EVA (Paischer
et al. 2024, arXiv 2410.07170), LoRA-GA (Wang et al., NeurIPS 2024, arXiv 2407.05000) and LoRA-One
(Zhang et al., ICML 2025, arXiv 2502.01235) choose where A and B start: `lora_init.py` and
`lora_data_init.py`. QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314) is LoRA on a base in 4
bits.

PiSSA's, OLoRA's and LoRA-GA's papers subtract s B0 A0 from W. Here W is not written: the delta is
s (B A - B0 A0) with the start kept in buffers. This is the same function, and the base stays the
original under every switch, merge and export. Biases that train beside the factors (`bias`) do so
in place, as in peft: they stay when the adapter is switched off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.delta import WeightDelta
from peftcli.core.layer import Layer
from peftcli.core.siblings import Siblings, families
from peftcli.core.site import Site, find_sites
from peftcli.errors import ConfigError
from peftcli.kernels.lora_linear import Branch, lora_linear, lora_linears
from peftcli.methods.lora_data_init import prepare
from peftcli.methods.lora_init import DatalessInit, Start, init_of
from peftcli.methods.low_rank import LowRank
from peftcli.methods.selection import base_names, inside

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


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
        self.siblings: Siblings | None = None  # of linears that read the same input
        self.place = 0  # among them
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
        if layer.is_plain:
            if self.siblings and (y := self.siblings.output(x, self.place)) is not None:
                return y
            p = self.dropout if self.training else 0.0
            return lora_linear(x, layer.weight, layer.bias, A, B, self.scale, p)
        y = layer(x)
        if x.is_floating_point():
            x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        h = layer.linear(x, A.to(y.dtype))
        if not x.is_floating_point():  # ids of an embedding: what is dropped are the looked-up rows
            h = F.dropout(h, self.dropout, self.training)
        return y + self.scale * layer.mix(h, B.to(y.dtype))


def together(x: Tensor, members: Sequence[tuple[nn.Module, LoRADelta]]) -> tuple[Tensor, ...]:
    """The outputs of linears that read the same `x`; all have the method's one dropout."""
    branches = [
        Branch(weights.dense(module), cast(Any, module).bias, *delta.factors(), delta.scale)
        for module, delta in members
    ]
    _, first = members[0]
    return lora_linears(x, branches, first.dropout if first.training else 0.0)


@dataclass(frozen=True)
class LoRA(LowRank):
    """Low-rank adaptation of linear, convolution and embedding weights."""

    hf_fields: ClassVar[Mapping[str, str]] = {**LowRank.hf_fields, "bias": "bias"}

    bias: Literal["none", "all", "lora_only"] = "none"
    init: DatalessInit | Literal["loftq", "eva", "lora_ga", "lora_one"] = "default"
    init_batches: Annotated[int, Ge(1)] | None = None
    rho: Annotated[float, Ge(1)] = 2.0
    tau: Annotated[float, Gt(0), Le(1)] = 0.99
    whiten: bool = False
    adjust_scaling: bool = True
    stable_gamma: Annotated[float, Gt(0)] | None = None
    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    ga_scale: Literal["stable", "unit", "weight_svd", "gd_scale", "peft"] = "stable"
    loftq_bits: Literal[4, 8] = 4
    loftq_iter: Annotated[int, Ge(1)] = 1
    lr_ratio: Annotated[float, Gt(0)] | None = None
    embedding_lr: Annotated[float, Gt(0)] = 1e-6

    @property
    def starts_at_base(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """LoRA-One's factors are a step already taken, and LoftQ's correct a quantised weight."""
        return self.init not in ("lora_one", "loftq")

    @property
    def gamma(self) -> float:
        """`stable_gamma`, or the papers' 16 for LoRA-GA and 128 for LoRA-One."""
        return self.stable_gamma or (128.0 if self.init == "lora_one" else 16.0)

    def biases(self, host: Host, name: str) -> list[str]:
        """The base's biases that train beside the factors of the adapter `name`."""
        if self.bias == "none":
            return []
        found = [n for n in dict.fromkeys(base_names(host).values()) if n.endswith(".bias")]
        if self.bias == "lora_only":
            adapted = {f"{site.path}.bias" for site in host.sites[name]}
            found = [n for n in found if n in adapted]
        whole = set(inside(found, host.saved_modules))  # train and are saved anyway
        return [n for n in found if n not in whole]

    def with_ranks(self, sites: Sequence[Site], ranks: Mapping[str, int], keep_scale: bool) -> LoRA:
        """The method with these ranks written out by site; alpha follows where s is to be kept."""
        alphas = {}
        for site in sites:
            alpha, r = site.pick(self.alpha_pattern, self.alpha), ranks[site.name]
            alphas[site.name] = self._alpha(self.scale(site), r) if keep_scale and r else alpha
        return replace(self, rank_pattern=dict(ranks), alpha_pattern=alphas)

    def build(self, site: Site, start: Start | None = None) -> LoRADelta:
        """A pair of factors for the site, started by `start`, or as `init` does without data."""
        delta = LoRADelta(site, self.rank(site), self.scale(site), self.dropout)
        if site.device.type != "meta":  # without weights there is nothing to start
            (start or init_of(self.init))(delta, site)
        return delta

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Graft a started pair of factors on every site whose rank is not 0."""
        sites = [site for site in host.find(self.target_modules) if self.rank(site)]
        method, start = prepare(self, host, sites, data)
        deltas: dict[str, LoRADelta] = {}
        for site in sites:
            if method.rank(site):
                host.graft(site, delta := method.build(site, start))
                deltas[site.name] = delta
        for family in families(site for site in sites if site.name in deltas):
            members = [(site.module, deltas[site.name]) for site in family]
            siblings = Siblings(members, together)
            for place, (_, delta) in enumerate(members):
                delta.siblings, delta.place = siblings, place
        if self.bias != "none":
            biases = self.biases(host, host.building)
            host.matched[host.building]["biases"] = len(biases)
            host.select(biases)

    def published(self, host: Host, name: str) -> LoRA:
        """With EVA's ranks written out; the other shapes follow from the fields."""
        if self.init != "eva":
            return self
        sites = find_sites(host.model, host.layout, self.target_modules)[0]
        deltas = {site.name: cast(LoRADelta, d) for site, d in host.deltas(name)}
        ranks = {s.name: len(deltas[s.name].A) if s.name in deltas else 0 for s in sites}
        return replace(self.with_ranks(sites, ranks, self.adjust_scaling), init="default")

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

    def hf_refuses(self, host: Host, name: str) -> str | None:
        """A base that LoftQ quantised anew, too."""
        if self.init == "loftq" and self.loftq_iter > 1:
            return "the base was quantised anew (loftq_iter > 1)"
        return super().hf_refuses(host, name)

    def hf_tensors(self, host: Host, name: str) -> dict[str, Tensor]:
        """The factors, and biases, which peft finds within what it wraps around a module."""
        adapted = {site.path for site in host.sites[name]}
        held = super().hf_tensors(host, name)
        for bias in self.biases(host, name):
            path = bias.removesuffix(".bias")
            key = f"{path}.base_layer.bias" if path in adapted else bias
            held[key] = host.model.get_parameter(bias)
        return held

    @classmethod
    def hf_acting(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """With `bias="all"` peft also writes its own copies of the biases of whole modules."""
        copies = (".modules_to_save.bias", ".original_module.bias")
        return {key: t for key, t in tensors.items() if not key.endswith(copies)}

    @classmethod
    def reads_hf(cls, config: Mapping[str, Any]) -> bool:
        """Everything of this type but DoRA."""
        return not config.get("use_dora")
