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
refused where tokens are generated: its mean would read the tokens to come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from peftcli.core.delta import Delta, OutputDelta
from peftcli.core.layer import Layer
from peftcli.core.method import Method
from peftcli.core.site import Sublayer
from peftcli.errors import ConfigError, NotApplicable

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

Activation = Literal["relu", "gelu", "gelu_new", "swish", "tanh", "sigmoid", "leaky_relu", "linear"]
Scale = float | Literal["learned", "channel"]
Position = Literal["attn", "cross", "ffn"]


class Affine(nn.Linear):
    """y = W x + b, computed in the type of x."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return F.linear(input, self.weight.to(input.dtype), self.bias.to(input.dtype))


class Norm(nn.LayerNorm):
    """A new LayerNorm, computed in its own precision."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


def _houlsby(weight: Tensor) -> None:
    nn.init.trunc_normal_(weight, std=0.01, a=-0.02, b=0.02)


def _lora(down: nn.Linear, up: nn.Linear) -> None:
    nn.init.kaiming_uniform_(down.weight, a=5**0.5)
    nn.init.zeros_(up.weight)


def _each(init: Callable[[Tensor], object]) -> Callable[[nn.Linear, nn.Linear], None]:
    def both(down: nn.Linear, up: nn.Linear) -> None:
        init(down.weight)
        init(up.weight)

    return both


# Biases start at zero everywhere. Only `lora` starts exactly at the base.
INITS: dict[str, Callable[[nn.Linear, nn.Linear], None]] = {
    "bert": _each(lambda weight: nn.init.normal_(weight, std=0.02)),
    "houlsby": _each(_houlsby),
    "lora": _lora,
}


def projections(D: int, R: int, init: str, O: int | None = None) -> tuple[Affine, Affine]:  # noqa: E741
    """(D -> R, R -> O), O = D where it is not given, at one of `INITS`."""
    down, up = Affine(D, R), Affine(R, O or D)
    nn.init.zeros_(down.bias)
    nn.init.zeros_(up.bias)
    INITS[init](down, up)
    return down, up


class Bottleneck(nn.Module):
    """core(x) = LN?(g drop(s up(drop_inner(act(down(LN?(x)))))))."""

    def __init__(
        self,
        D: int,
        down: nn.Module,
        up: nn.Module,
        act: Activation,
        *,
        scale: Scale = 1.0,
        dropout: float = 0.0,
        inner_dropout: float = 0.0,
        drop_path: float = 0.0,
        ln_in: bool = False,
        ln_out: bool = False,
        gate: bool = False,
    ) -> None:
        super().__init__()
        self.down, self.up, self.act = down, up, ACT2FN[act]
        self.dropout, self.inner_dropout, self.drop_path = dropout, inner_dropout, drop_path
        self.scale: float | nn.Parameter = (
            nn.Parameter(torch.ones(D if scale == "channel" else 1))
            if isinstance(scale, str)
            else scale
        )
        self.ln_in, self.ln_out = (Norm(D) if on else None for on in (ln_in, ln_out))
        self.gate = Affine(D, 1) if gate else None
        if self.gate is not None:
            nn.init.normal_(self.gate.weight, std=0.02)
            nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D), the branch alone."""
        h = self.act(self.down(x if self.ln_in is None else self.ln_in(x)))
        h = self.up(F.dropout(h, self.inner_dropout, self.training))
        if isinstance(self.scale, Tensor):
            h = self.scale.to(h.dtype) * h
        elif self.scale != 1:  # a pass over h, forward and backward
            h = self.scale * h
        h = F.dropout(h, self.dropout, self.training)
        if self.training and self.drop_path:
            keep = h.new_empty(len(h), *[1] * (h.ndim - 1)).bernoulli_(1 - self.drop_path)
            h = h * keep / (1 - self.drop_path)
        if self.gate is not None:
            h = h * self.gate(x).sigmoid().mean(1, keepdim=True)
        return h if self.ln_out is None else self.ln_out(h)


class AdapterDelta(OutputDelta):
    """y' = y + core(y): behind a sub-layer, behind the sum with its residual, or behind a norm."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def edit(self, y: Tensor, x: Tensor) -> Tensor:
        """y + core(y)."""
        return y + self.core(y)


class BeforeNormDelta(Delta):
    """At a norm, whose input is x = u + r: LN(core(LN(x)) + x), or without the outer LN."""

    def __init__(self, core: nn.Module, norm_after: bool) -> None:
        super().__init__()
        self.core, self.norm_after = core, norm_after

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """The norm's own weights serve twice."""
        h = self.core(layer(x)) + x
        return layer(h) if self.norm_after else h


class LentDelta(Delta):
    """A delta that also reads the input of another module, which is called before it."""

    lent: Tensor | None = None

    def take(self) -> Tensor:
        """What `LendDelta` lent in this forward."""
        x, self.lent = self.lent, None
        assert x is not None, "the lending module was not called"
        return x


class LendDelta(Delta):
    """Lends the input of its module to deltas that are called later."""

    def __init__(self, *to: LentDelta) -> None:
        super().__init__()
        self.to_deltas = to  # in a tuple: each is registered on its own module

    def forward(self, x: Any, layer: Layer) -> Any:
        """layer(x)."""
        for delta in self.to_deltas:
            delta.lent = x
        return layer(x)


class StreamDelta(LentDelta):
    """In the middle of a pre-norm block: u + core(u + r), with r lent by the norm that reads it."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """The block itself adds r."""
        u = layer(x)
        return u + self.core(u + self.take())


def attach(
    host: Host, sub: Sublayer, core: nn.Module, before: bool, after: bool, residual: bool | str
) -> None:
    """Graft `core` behind the sub-layer: LN (or the sum alone) `before` it, or `after` it."""
    if not before:
        host.graft(sub.end, AdapterDelta(core))
    elif sub.norm is not None:
        plain = not after and residual is False
        host.graft(sub.norm, AdapterDelta(core) if plain else BeforeNormDelta(core, after))
    elif sub.stream is not None:
        host.graft(sub.stream, AdapterDelta(core))
    else:
        assert sub.entry is not None
        delta = StreamDelta(core)
        host.graft(sub.entry, LendDelta(delta))
        host.graft(sub.end, delta)


def train_norms(host: Host) -> None:
    """Select every norm of the base."""
    norms = host.places("norm")
    host.select(
        f"{site.path}.{name}"
        for site in norms
        for name, _ in site.module.named_parameters(recurse=False)
    )


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


def places(host: Host, positions: tuple[str, ...], leave_out: tuple[int, ...]) -> list[Sublayer]:
    """Sub-layers of these kinds outside the layers left out. Raises `NotApplicable` where there
    are none.
    """
    subs = host.sublayers(positions, leave_out)
    if not subs:
        raise NotApplicable(
            f"{type(host.model).__name__} has no {' or '.join(positions)} sub-layer outside of "
            f"leave_out={list(leave_out)}; transformers with blocks of attention and "
            "feed-forward work."
        )
    return subs
