"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al., ICML 2024, arXiv 2402.09353.

    y = diag(g) V x + b    V = W + s B A (O, I), g_i = m_i / ||V_i||, m (O,), s = alpha / r

Full fine-tuning moves sizes and directions of rows apart from each other; so each output row gets
a trained length m and a direction that LoRA trains, and they start at those of W.

||V_i||^2 = ||W_i||^2 + 2 s (W A')_i . B_i + s^2 B_i (A A') B_i' needs no (O, I) temporary, where
peft forms B A. As in the paper's section 4.3 the norm is a constant of the backward pass
(`detach_norm`). m does not decay, since decay would shrink the weight itself; peft decays it.
Targets of `magnitude_only_modules` train m alone, as in the paper's ablation. The factors may start
as LoRA's do without a look at the data (`init`, `lora_init.py`): V is W at first in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from peftcli.core import weights
from peftcli.core.delta import Delta
from peftcli.core.layer import Layer
from peftcli.core.rows import RowsDelta
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.kernels.dora_linear import dora_linear
from peftcli.kernels.dropout import dropout
from peftcli.methods.lora import LoRADelta
from peftcli.methods.lora_init import DatalessInit, init_of
from peftcli.methods.low_rank import LowRank

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

MAGNITUDE = "lora_magnitude_vector"  # peft's key; some of its versions add `.weight`


class MagnitudeDelta(Delta):
    """y = diag(m / ||W_i||) W x + b: the rows of W get new lengths, their directions stay."""

    def __init__(self, site: Site, detach_norm: bool) -> None:
        super().__init__()
        self.axis, self.detach_norm = weights.channel_axis(site.module), detach_norm
        self.m = nn.Parameter(site.weight.float().norm(dim=1))  # (O,), so g = 1 at start

    def norm(self, W: Tensor) -> Tensor:
        """||W_i|| (O,) in m's precision, above 0 for a row of zeros."""
        return torch.linalg.vector_norm(W, dim=1, dtype=self.m.dtype).clamp_min(1e-12)

    def gain(self, W: Tensor) -> Tensor:
        """g = m / norm (O,); by default the norm is a constant of the backward pass."""
        with torch.autocast(W.device.type, enabled=False):
            if not self.detach_norm:
                return self.m / self.norm(W)
            with torch.no_grad():
                norm = self.norm(W)
            return self.m / norm

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """diag(g) W; the bias is not scaled."""
        return self.gain(W)[:, None] * W.to(self.m.dtype), b

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """y + (g - 1) (y - b) for the layer's own output y."""
        y = layer(x)
        return y + self.along(self.gain(layer.weight) - 1, y) * self.without_bias(y, layer)

    def along(self, v: Tensor, y: Tensor) -> Tensor:
        """The vector `v` (O,) along the channels of `y`, in its type."""
        return weights.along(v, y, self.axis).to(y.dtype)

    def without_bias(self, y: Tensor, layer: Layer) -> Tensor:
        """y - b."""
        return y if layer.bias is None else y - self.along(layer.bias, y)


class DoRADelta(MagnitudeDelta):
    """y = diag(m / ||V_i||) V x + b with V = W + s B A  (Liu et al. 2024, eq. 5)."""

    def __init__(self, site: Site, lora: LoRADelta, detach_norm: bool) -> None:
        super().__init__(site, detach_norm)
        self.lora = lora  # A (R, I), B (O, R), zero at start
        self.known: tuple[object, Tensor] | None = None  # of what W, and its ||W_i||^2

    def norm(self, W: Tensor) -> Tensor:
        """||V_i|| (O,) from three thin products, block by block for a grouped convolution."""
        G, s = self.lora.groups, self.lora.scale
        A, B = (M.view(G, -1, M.shape[1]) for M in self.lora.factors())
        WA = W.to(A.dtype).view(G, -1, W.shape[1]) @ A.mT  # (G, O/G, R/G)
        cross = 2 * s * (WA * B).sum(-1) + s**2 * (B @ (A @ A.mT) * B).sum(-1)
        return (self.square(W) + cross.flatten()).clamp_min(1e-24).sqrt()

    def square(self, W: Tensor) -> Tensor:
        """||W_i||^2 (O,); of a frozen parameter it is kept until that changes."""
        owner = W if W._base is None else W._base
        frozen = isinstance(owner, nn.Parameter) and not owner.requires_grad
        if torch.compiler.is_compiling() or not frozen or owner.is_inference():
            return super().norm(W).square()
        which = (owner.data_ptr(), owner._version, self.m.dtype)
        if self.known is None or self.known[0] != which:
            self.known = (which, super().norm(W).square())
        return self.known[1]

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """diag(g) (W + s B A)."""
        return self.gain(W)[:, None] * self.lora.merged(W, b)[0], b

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """y + (g - 1) W x' + g s B A x' with x' = drop(x), where y = W x + b saw all of x."""
        p = self.lora.dropout if self.training and x.is_floating_point() else 0.0
        if layer.is_plain:
            return self._on_plain(x, layer, p)
        y, lora, W = layer(x), self.lora, layer.weight
        if p:
            x = F.dropout(x, p)
            Wx = layer.linear(x.to(y.dtype), W.to(y.dtype))
        else:
            Wx = self.without_bias(y, layer)
        g = self.gain(W)
        x = x.to(y.dtype) if x.is_floating_point() else x
        A, B = lora.factors()
        h = layer.mix(layer.linear(x, A.to(y.dtype)), B.to(y.dtype))
        return y + self.along(g - 1, y) * Wx + self.along(g * lora.scale, y) * h

    def _on_plain(self, x: Tensor, layer: Layer, p: float) -> Tensor:
        """The same as g V x' + W (x - x') + b."""
        W, b, lora = layer.weight, layer.bias, self.lora
        seen = dropout(x, p) if p else x
        rest = layer.linear(x - seen, W, b) if p else b
        return dora_linear(seen, W, rest, *lora.factors(), self.gain(W), lora.scale)


@dataclass(frozen=True)
class DoRA(LowRank):
    """Magnitudes and low-rank directions of linear, convolution and embedding weights."""

    hf_harmless: ClassVar[frozenset[str]] = LowRank.hf_harmless | {"use_dora"}

    r: Annotated[int, Ge(1)] = 32
    alpha: Annotated[float, Gt(0)] = 64.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.05
    target_modules: str | tuple[str, ...] = ("q", "k", "v", "up", "down")
    init: DatalessInit = "default"
    detach_norm: bool = True
    magnitude_only_modules: str | tuple[str, ...] = ()

    def build(self, site: Site) -> DoRADelta:
        """Magnitudes with a pair of factors, started as `init` says."""
        lora = LoRADelta(site, self.rank(site), self.scale(site), self.dropout)
        if site.device.type != "meta":
            init_of(self.init)(lora, site)
        return DoRADelta(site, lora, self.detach_norm)

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Graft on the targets, and magnitudes alone on `magnitude_only_modules`."""
        sites = [site for site in host.find(self.target_modules) if self.rank(site)]
        counts, only = host.matched[host.building], []
        if self.magnitude_only_modules:
            only = host.find(self.magnitude_only_modules)
            host.matched[host.building] |= counts
        if both := {site.path for site in sites} & {site.path for site in only}:
            raise ConfigError(
                f"method.magnitude_only_modules and method.target_modules both mean {min(both)}; "
                "name it in one of them."
            )
        for site in sites:
            host.graft(site, self.build(site))
        for site in only:
            host.graft(site, MagnitudeDelta(site, self.detach_norm))

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """Magnitudes alone, too."""
        if self.magnitude_only_modules:
            return "peft trains no magnitudes without factors (magnitude_only_modules)"
        return super().hf_refuses(host, name)

    def hf_module(self, module: nn.Module, delta: Delta) -> dict[str, Tensor]:
        """LoRA's factors and the magnitudes of all rows; those without a role keep W's."""
        m = _magnitudes(module, delta)
        if isinstance(module, _ConvNd):
            m = m.view(1, -1, *[1] * len(module.kernel_size))
        return {**super().hf_module(module, delta), MAGNITUDE: m}

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """LoRA's, with `use_dora`."""
        return {**super().hf_config(host, name), "use_dora": True}

    @classmethod
    def hf_acting(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """With the magnitudes under one name."""
        return {key.replace(f"{MAGNITUDE}.weight", MAGNITUDE): t for key, t in tensors.items()}

    @classmethod
    def reads_hf(cls, config: Mapping[str, Any]) -> bool:
        """LoRA's type with `use_dora`."""
        return bool(config.get("use_dora"))


def _magnitudes(module: nn.Module, delta: Delta) -> Tensor:
    """m (O,) of all rows of the module."""
    if isinstance(delta, MagnitudeDelta):
        return delta.m
    assert isinstance(delta, RowsDelta), type(delta)
    m = weights.dense(module).float().norm(dim=1)
    for role in delta.parts:
        m[delta.index(role)] = _magnitudes(module, delta.part(role)).detach()
    return m
