"""Head of the adapter family: the bottleneck, the deltas that put it behind a sub-layer, before a
norm or into the stream, and the places for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from peftcli.core.delta import Delta, OutputDelta
from peftcli.core.layer import Layer
from peftcli.core.sublayer import Sublayer
from peftcli.errors import NotApplicable

if TYPE_CHECKING:
    from peftcli.core.host import Host

Activation = Literal["relu", "gelu", "gelu_new", "swish", "tanh", "sigmoid", "leaky_relu", "linear"]
Scale = float | Literal["learned", "channel"]


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
