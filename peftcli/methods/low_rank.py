"""What LoRA, DoRA and LaMDA have in common: ranks, scales, and their place in Hugging Face peft's
files, where the change of a module is a pair of factors and alpha.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from peftcli.core.delta import Delta
from peftcli.core.graft import deltas_of
from peftcli.core.method import Method
from peftcli.core.rows import RowsDelta
from peftcli.core.site import Site

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.methods.lora import LoRADelta


def kaiming(*shape: int) -> nn.Parameter:
    """Uniform in +-1/sqrt(f), f the size of a row."""
    parameter = nn.Parameter(torch.empty(shape))
    nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
    return parameter


@dataclass(frozen=True)
class LowRank(Method):
    """Ranks and scales of factored changes, and their place in peft."""

    family: ClassVar[str] = "low-rank"
    size_option: ClassVar[str | None] = "r"
    patterns: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")
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
    rank_pattern: dict[str, Annotated[int, Ge(0)]] = field(default_factory=dict)
    alpha_pattern: dict[str, Annotated[float, Gt(0)]] = field(default_factory=dict)

    def rank(self, site: Site) -> int:
        """The site's rank."""
        return int(site.pick(self.rank_pattern, self.r))

    def scale(self, site: Site) -> float:
        """s = alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha, r = site.pick(self.alpha_pattern, self.alpha), self.rank(site)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def _alpha(self, scale: float, r: int) -> float:
        return scale * (math.sqrt(r) if self.use_rslora else r)

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """Convolutions whose factors differ from peft's."""
        for site in host.sites[name]:
            dilation = getattr(site.module, "dilation", (1,))
            if site.groups > 1 or set(dilation) != {1}:
                return f"peft computes the grouped or dilated convolution {site.path} otherwise"
        return None

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
            alphas[path] = self._alpha(scale, A.shape[0])
        r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
        return {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": {path: n for path, n in ranks.items() if n != r},
            "alpha_pattern": {path: n for path, n in alphas.items() if n != alpha},
            "fan_in_fan_out": all(isinstance(m, Conv1D) for m in modules.values()),
            "init_lora_weights": True,
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Ranks and alphas of single modules. Raises ValueError for factors that were saved
        relative to a changed base.
        """
        init = str(config.get("init_lora_weights"))
        if init.startswith(("pissa", "olora", "corda", "lora_ga", "loftq")):
            raise ValueError(
                f"saved relative to a changed base (init_lora_weights={init!r}); convert it in "
                "peft first (path_initial_model_for_weight_conversion)."
            )
        return {key: dict(config.get(key) or {}) for key in ("rank_pattern", "alpha_pattern")}


def _whole(delta: Delta) -> tuple[Tensor, Tensor, float]:
    """(A, B, s) of a module's whole change. The roles of a fused linear become one pair: B is zero
    on other rows.
    """
    if not isinstance(delta, RowsDelta):
        pair = cast("LoRADelta", getattr(delta, "lora", delta))  # DoRA's is a part of it
        return *pair.factors(), pair.scale
    parts = {role: _whole(delta.part(role)) for role in delta.parts}
    scale = next(iter(parts.values()))[2]
    B = delta.side_by_side({role: B * (s / scale) for role, (_, B, s) in parts.items()})
    return torch.cat([A for A, _, _ in parts.values()]), B, scale


def _commonest(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]
