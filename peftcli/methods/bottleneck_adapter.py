"""Bottleneck adapters: Parameter-Efficient Transfer Learning for NLP. Houlsby et al., ICML 2019,
arXiv 1902.00751.

    core(x) = g drop(s (act(LN?(x) W_down + b_down) W_up + b_up))       W_down (D, R), W_up (R, D)

A small two-layer network with a residual around it, behind a frozen sub-layer, is enough to steer
what the sub-layer gives. With u the sub-layer's raw output, r its residual and LN the norm behind
the sum (left out in pre-norm models), a model goes on from

    houlsby       LN(u + core(u) + r)                  behind attention and feed-forward
    pfeiffer      LN(core(v) + u + r),  v = LN(u + r)  behind feed-forward
    adapter_plus  core(v) + v,          v = LN(u + r)  behind feed-forward

Presets: `pfeiffer` is AdapterFusion (Pfeiffer et al., EACL 2021, arXiv 2005.00247) and MAD-X (EMNLP
2020, arXiv 2005.00052), `adapter_plus` is Adapters Strike Back (Steitz & Roth, CVPR 2024, arXiv
2406.06820). The gate is UniPELT's (Mao et al., ACL 2022, arXiv 2110.07577): g = sigmoid(x w + b),
its mean over the sequence. `leave_out` drops layers as AdapterDrop does (Rueckle et al., EMNLP
2021, arXiv 2010.11918).

u is read before the base's own dropout, also in BERT, whose adapters read it behind. In a model
where attention and feed-forward share one sum, the feed-forward's r is nothing. Wirings in which
the residual would count twice or not at all are refused; the libraries compute them. A gate is
refused where tokens are generated: its mean would read the tokens to come. Files are in our own
format; that of the library `adapters` is not written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from annotated_types import Ge, Gt, Lt
from transformers import PreTrainedModel

from peftcli.core.method import Method
from peftcli.core.sublayer import Sublayer
from peftcli.errors import ConfigError, NotApplicable
from peftcli.methods.adapter import (
    Activation,
    Bottleneck,
    Scale,
    attach,
    places,
    projections,
    train_norms,
)

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

Position = Literal["attn", "cross", "ffn"]

_WIRING = ("original_ln_before", "residual_before_ln", "original_ln_after")
_SOUND = {  # the residual enters exactly once
    (False, True, True),
    (False, False, True),  # what the adapter sees is u
    (True, True, True),
    (True, False, False),
    (True, "post_add", False),
}
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "houlsby": {
        "positions": ("attn", "ffn"),
        "reduction_factor": 16.0,
        "act": "swish",
        "scale": 1.0,
        "drop_path": 0.0,
        "init": "bert",
        "train_layernorm": True,
        **dict(zip(_WIRING, (False, True, True), strict=True)),
    },
    "pfeiffer": {
        "positions": ("ffn",),
        "reduction_factor": 16.0,
        "act": "relu",
        "scale": 1.0,
        "drop_path": 0.0,
        "init": "bert",
        "train_layernorm": False,
        **dict(zip(_WIRING, (True, True, True), strict=True)),
    },
    "adapter_plus": {
        "positions": ("ffn",),
        "reduction_factor": 96.0,
        "act": "gelu",
        "scale": "channel",
        "drop_path": 0.1,
        "init": "houlsby",
        "train_layernorm": False,
        **dict(zip(_WIRING, (True, False, False), strict=True)),
    },
}


@dataclass(frozen=True)
class BottleneckAdapter(Method):
    """Adapters behind sub-layers. A field that is None has its preset's value."""

    family: ClassVar[str] = "adapter"
    size_option: ClassVar[str | None] = "bottleneck_dim"

    preset: Literal["houlsby", "pfeiffer", "adapter_plus"] = "houlsby"
    positions: tuple[Position, ...] | None = None
    leave_out: tuple[Annotated[int, Ge(0)], ...] = ()
    reduction_factor: Annotated[float, Gt(0)] | dict[str, Annotated[float, Gt(0)]] | None = None
    bottleneck_dim: Annotated[int, Ge(1)] | None = None
    act: Activation | None = None
    scale: Scale | None = None
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    drop_path: Annotated[float, Ge(0), Lt(1)] | None = None
    ln_in: bool = False
    ln_out: bool = False
    gate: bool = False
    init: Literal["bert", "houlsby", "lora"] | None = None
    train_layernorm: bool | None = None
    original_ln_before: bool | None = None
    residual_before_ln: bool | Literal["post_add"] | None = None
    original_ln_after: bool | None = None

    @property
    def starts_at_base(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """With `lora`; else near it."""
        return self.value("init") == "lora"

    def value(self, field: str) -> Any:
        """The field's value, or its preset's."""
        given = getattr(self, field)
        return PRESETS[self.preset][field] if given is None else given

    def width(self, D: int, layer: int | None) -> int:
        """R = max(1, D / reduction_factor) for a layer, or `bottleneck_dim`."""
        if self.bottleneck_dim is not None:
            return self.bottleneck_dim
        factor = self.value("reduction_factor")
        if isinstance(factor, Mapping):
            if str(layer) not in factor and "default" not in factor:
                raise ConfigError(
                    f"method.reduction_factor has no entry for layer {layer}; add a default."
                )
            factor = factor.get(str(layer), factor.get("default"))
        return max(1, int(D / factor))

    def core(self, D: int, layer: int | None) -> Bottleneck:
        """The adapter of one place, without its residual."""
        down, up = projections(D, self.width(D, layer), self.value("init"))
        return Bottleneck(
            D,
            down,
            up,
            self.value("act"),
            scale=self.value("scale"),
            dropout=self.dropout,
            drop_path=self.value("drop_path"),
            ln_in=self.ln_in,
            ln_out=self.ln_out,
            gate=self.gate,
        )

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """An adapter at every position of every layer; base norms train where the preset says."""
        wiring = tuple(self.value(field) for field in _WIRING)
        subs = self._sublayers(host, wiring)
        for sub in subs:
            attach(
                host, sub, self.core(sub.end.d_out, sub.end.layer), wiring[0], wiring[2], wiring[1]
            )
        if self.value("train_layernorm"):
            train_norms(host)

    def _sublayers(self, host: Host, wiring: tuple[Any, ...]) -> list[Sublayer]:
        """The places, once all is known to be possible."""
        name = type(host.model).__name__
        if wiring not in _SOUND:
            raise ConfigError(
                f"method: {', '.join(f'{k}={v}' for k, v in zip(_WIRING, wiring, strict=True))} "
                "counts the residual twice or not at all. Take a preset's three values."
            )
        if self.gate and cast(PreTrainedModel, host.model).can_generate():
            raise NotApplicable(
                f"method.gate averages over the whole sequence, which {name} does not have while "
                "it generates; take method.gate=false."
            )
        subs = places(host, self.value("positions"), self.leave_out)
        stuck = [s for s in subs if wiring[0] and not (s.norm or s.stream or s.entry)]
        if stuck:
            raise NotApplicable(
                f"{name} does not show which norm reads the residual of {stuck[0].end.path}; take "
                "method.positions=[ffn], or a wiring with original_ln_before=false."
            )
        return subs
