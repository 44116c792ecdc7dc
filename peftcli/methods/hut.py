"""HUT: A More Computation Efficient Fine-Tuning Method With Hadamard Updated Transformation. Zhang,
Zhou, Chen, 2024, arXiv 2409.13501.

    W' = W * (1 + s M_B M_A)        M_B (O, R), M_A (R, I), * elementwise, s = alpha / r

The weight is transformed by itself: every entry is scaled by an entry of a low-rank matrix, so the
change has a high rank and entries that are zero stay zero.

The paper's code was never published, and its abstract says no more than that the new weight is a
function of the old by a Hadamard product of two low-rank matrices. The formulas are therefore an
interpretation, chosen by `form`:

    mul       W * (1 + s M_B M_A), the map of HiRA (Huang et al., ICLR 2025), which peft has
    mul_pure  W * (M_B M_A), starting at the matrix of ones
    affine    W * (1 + s M_B M_A) + s M_D M_C, a scale and a shift
    two_masks W * (1 + s u v') = W + s diag(u) W diag(v), a mask of rows and one of columns: `mul`
              of rank 1, whatever `r` is

Starts, targets and the scale are ours too. Dropout on the input would drop the base as well;
`weight_dropout` drops entries of the low-rank change instead. Gradients shrink with |W|, so the
learning rate is to be larger than LoRA's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.delta import Delta, WeightDelta
from peftcli.core.layer import Layer
from peftcli.core.method import Method
from peftcli.core.site import Site
from peftcli.kernels.modulated_linear import modulated_linear
from peftcli.methods.low_rank import kaiming

if TYPE_CHECKING:
    from peftcli.core.host import Host

Form = Literal["mul", "mul_pure", "affine", "two_masks"]


class HUTDelta(WeightDelta):
    """dW = W * M, M = s M_B M_A  (or M_B M_A - 1; or with the shift s M_D M_C)."""

    def __init__(self, site: Site, r: int, scale: float, form: Form, dropout: float) -> None:
        super().__init__()
        self.scale, self.form, self.dropout = scale, form, dropout
        self.M_A = kaiming(r, site.d_in)  # (R, I)
        self.M_B = nn.Parameter(torch.zeros(site.d_out, r))  # (O, R), zero so dW = 0 at start
        if form == "mul_pure":  # ones times ones: M_B M_A = 1 at start
            with torch.no_grad():
                self.M_A[0] = 1.0
                self.M_B[:, 0] = 1.0
        elif form == "affine":
            self.M_C = kaiming(r, site.d_in)  # (R, I)
            self.M_D = nn.Parameter(torch.zeros(site.d_out, r))  # (O, R)

    def delta(self, W: Tensor) -> Tensor:
        """W * M, and the shift."""
        return self.changed_by(W, self.modulation())

    def modulation(self) -> Tensor:
        """M (O, I), what W is scaled by beside 1."""
        M = self.M_B @ self.M_A
        return M - 1 if self.form == "mul_pure" else self.scale * M

    def changed_by(self, W: Tensor, M: Tensor) -> Tensor:
        """W * M, and the shift."""
        return W * M + self.scale * self.M_D @ self.M_C if self.form == "affine" else W * M

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """The layer's product with W'; entries of M are dropped while training."""
        if not (self.training and self.dropout):
            if self.form == "affine" or not layer.is_plain:
                return super().forward(x, layer)
            s, c = (1.0, -1.0) if self.form == "mul_pure" else (self.scale, 0.0)
            return modulated_linear(x, layer.weight, layer.bias, self.M_B, self.M_A, s, c)
        W = layer.weight
        W = W + self.changed_by(W, F.dropout(self.modulation(), self.dropout))
        return layer.linear(x, W.to(x.dtype) if x.is_floating_point() else W, layer.bias)


@dataclass(frozen=True)
class HUT(Method):
    """Low-rank multiplicative modulation of linear, convolution and embedding weights."""

    family: ClassVar[str] = "low-rank"
    size_option: ClassVar[str | None] = "r"
    peft_type: ClassVar[str | None] = "HIRA"
    hf_fields: ClassVar[Mapping[str, str]] = {"r": "r"}
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        "fan_in_fan_out init_weights hira_dropout rank_pattern".split()
    )  # peft's HiRA does not look at its rank_pattern

    r: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] | None = None
    form: Form = "mul"
    weight_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | tuple[str, ...] = ("q", "v")

    @property
    def rank(self) -> int:
        """That of the modulation."""
        return 1 if self.form == "two_masks" else self.r

    def build(self, site: Site) -> HUTDelta:
        """One pair of factors for the site, or two."""
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return HUTDelta(site, self.rank, scale, self.form, self.weight_dropout)

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """HiRA is `mul`; its convolutions and embeddings keep other factors than ours."""
        if self.form in ("mul_pure", "affine"):
            return f"peft has no form={self.form}"
        part = next((s for s in host.sites[name] if s.rows or s.kind != "linear"), None)
        return part and f"peft has no such delta at {part.name}"

    def hf_module(self, module: nn.Module, delta: Delta) -> dict[str, Tensor]:
        """HiRA has no alpha: s is in its B."""
        assert isinstance(delta, HUTDelta)
        B = delta.M_B if delta.scale == 1 else delta.scale * delta.M_B
        return {"hira_A": delta.M_A, "hira_B": B}

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """What peft wants to know of the modules."""
        modules = [site.module for site in host.sites[name]]
        return {"r": self.rank, "fan_in_fan_out": all(isinstance(m, Conv1D) for m in modules)}
