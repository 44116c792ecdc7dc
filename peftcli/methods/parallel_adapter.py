"""Parallel adapter: Towards a Unified View of Parameter-Efficient Transfer Learning. He, Zhou et
al., ICLR 2022, arXiv 2110.04366.

    y = FFN(x) + s (drop(ReLU(x W_down + b_down)) W_up + b_up)      W_down (D, R), W_up (R, D)

Every method of this field adds a change dh to some hidden state h, and differs in four choices:

    function      ReLU or linear bottleneck, softmax or ReLU over R trained keys and values
    insertion     parallel: dh reads the sub-layer's input; sequential: its output
    place         feed-forward, attention, or each head before the output projection
    composition   h + dh, h + s dh, or (1 - l) h + l dh

Of these the scaled parallel bottleneck beside the feed-forward part is the best single one, with a
large budget; changes of the heads are, with a small one. In each head, with q = Wq LN?(x),

    cross_attn_relu         dh = drop(ReLU(q P_k')) P_v            P_k, P_v (R, D / H) a head
    cross_attn(_noln)       dh = softmax(q P_k' / sqrt(D / H)) P_v
    concat                  the gated sum: exactly P_k, P_v as further keys and values (a prefix),
                            also said as cross_attn_noln with attn_composition=gate_add

The known methods are points of this space: Houlsby's adapter, prefix tuning and LoRA, which has its
own file. The branch is added behind the base's dropout, and drops with the same probability, not
with one of its own. The attention's bottleneck is added to the heads before the output projection,
as in the paper's code (`attn_before_out_proj`); it starts normal, with a norm before it and s = 1.
In pre-norm models x is what the sub-layer reads, behind its norm, unless `pre_ln_input`. Queries
of heads are taken before rotary positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from annotated_types import Ge
from torch import Tensor, nn

from peftcli.core.layer import Layer
from peftcli.core.method import Method
from peftcli.core.site import Site, find_sites
from peftcli.core.sublayer import Sublayer
from peftcli.errors import ConfigError, NotApplicable
from peftcli.methods.adapter import (
    AdapterDelta,
    Bottleneck,
    LendDelta,
    LentDelta,
    places,
    projections,
)
from peftcli.methods.heads import HeadsDelta, head_sizes
from peftcli.methods.prefix import prefixes_of
from peftcli.methods.prefix_tuning import PrefixTuning

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

GATED = ("concat", "cross_attn_noln")
HEADS = ("cross_attn_noln", "cross_attn", "cross_attn_relu")  # kinds of `HeadsDelta`


class BesideDelta(LentDelta):
    """y' = y + core(x), with the sub-layer's input x lent; or the module reads its own input plus
    core(x).
    """

    def __init__(self, core: nn.Module, to_input: bool) -> None:
        super().__init__()
        self.core, self.to_input = core, to_input

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """The change before or behind the module."""
        if self.to_input:
            return layer(x + self.core(self.take()))
        y = layer(x)  # lends, where the lender is inside
        return y + self.core(self.take())


@dataclass(frozen=True)
class ParallelAdapter(Method):
    """A bottleneck beside every feed-forward part, and a choice of changes of the attention."""

    family: ClassVar[str] = "adapter"
    size_option: ClassVar[str | None] = "ffn_r"

    ffn_r: Annotated[int, Ge(0)] = 512
    ffn_scale: float | Literal["learned"] = 4.0
    ffn_function: Literal["relu", "linear"] = "relu"
    ffn_insertion: Literal["parallel", "sequential"] = "parallel"
    ffn_layernorm: Literal["none", "in", "out"] = "none"
    ffn_init: Literal["lora", "bert"] = "lora"
    attn_kind: Literal[
        "none", "concat", "cross_attn_noln", "cross_attn", "cross_attn_relu", "parallel",
        "sequential",
    ] = "none"  # fmt: skip
    attn_r: Annotated[int, Ge(1)] = 200
    attn_composition: Literal["add", "gate_add"] = "add"
    attn_before_out_proj: bool = True
    pre_ln_input: bool = False
    leave_out: tuple[Annotated[int, Ge(0)], ...] = ()

    @property
    def starts_at_base(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What changes the attention starts normal."""
        return self.ffn_init == "lora" and self.attn_kind == "none"

    def __post_init__(self) -> None:
        """Refuse a gate on what is no softmax of the attention's own queries."""
        if self.attn_composition == "gate_add" and self.attn_kind not in GATED:
            raise ConfigError(
                f"method.attn_composition=gate_add shares one softmax with the tokens, which goes "
                f"with method.attn_kind={' or '.join(GATED)}, not with {self.attn_kind}."
            )

    @property
    def _attention(self) -> str:
        """The attention's entry: a gated sum is a concatenation."""
        return "concat" if self.attn_composition == "gate_add" else self.attn_kind

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """One entry for each feed-forward part and one for each attention."""
        kinds = (("ffn",) if self.ffn_r else ()) + (
            ("attn", "cross") if self._attention not in ("none", "concat") else ()
        )
        if not kinds and self._attention != "concat":
            raise ConfigError("method.ffn_r=0 and method.attn_kind=none leave nothing to train.")
        subs = places(host, kinds, self.leave_out) if kinds else []
        queries = self._queries(host) if self._attention in HEADS else []
        made = [self._entry(host, sub, queries) for sub in subs]
        lent: dict[str, tuple[Site, list[LentDelta]]] = {}
        if self._attention == "concat":
            prefix = replace(direct_prefix(self.attn_r), leave_out=self.leave_out)
            graft_prefix(host, prefix, data)
        for sub, (site, delta) in zip(subs, made, strict=True):
            host.graft(site, delta)
            if isinstance(delta, LentDelta):
                source = self._source(sub)
                lent.setdefault(source.path, (source, []))[1].append(delta)
        for source, deltas in lent.values():
            host.graft(source, LendDelta(*deltas))

    def _entry(
        self, host: Host, sub: Sublayer, queries: list[Site]
    ) -> tuple[Site, AdapterDelta | LentDelta]:
        """What is grafted for a sub-layer, and where."""
        p, D = model_dropout(host), sub.end.d_out
        if self.pre_ln_input and not (sub.norm or sub.entry):
            raise NotApplicable(
                f"{type(host.model).__name__} does not show which norm reads the residual of "
                f"{sub.end.path}; take method.pre_ln_input=false."
            )
        if sub.kind == "ffn":
            core = self._bottleneck(D, D, p)
            if self.ffn_insertion == "sequential":
                return sub.end, AdapterDelta(core)
            where = sub.norm or sub.stream or sub.end
            return where, BesideDelta(core, to_input=sub.norm is not None)
        if self._attention in HEADS:
            q = next(site for site in queries if site.path.startswith(sub.start.path + "."))
            sizes = head_sizes(host, q)
            delta = HeadsDelta(q, sub.end.d_in, sizes, self.attn_r, self._attention, p)
            return sub.end, delta
        before = self._attention == "parallel" and self.attn_before_out_proj
        width = sub.end.d_in if before else D
        down, up = projections(D, self.attn_r, "bert", width)
        core = Bottleneck(D, down, up, "relu", inner_dropout=p, ln_in=True)
        if self._attention == "sequential":
            return sub.end, AdapterDelta(core)
        return sub.end, BesideDelta(core, before)

    def _bottleneck(self, D: int, width: int, p: float) -> Bottleneck:
        down, up = projections(D, self.ffn_r, self.ffn_init, width)
        return Bottleneck(
            D,
            down,
            up,
            self.ffn_function,
            scale=self.ffn_scale,
            inner_dropout=p,
            ln_in=self.ffn_layernorm == "in",
            ln_out=self.ffn_layernorm == "out",
        )

    def _source(self, sub: Sublayer) -> Site:
        """What lends the sub-layer's input."""
        if self.pre_ln_input and sub.entry is not None:
            return sub.entry
        return sub.start

    def _queries(self, host: Host) -> list[Site]:
        if not any("q" in roles for roles in host.layout.roles.values()):
            raise NotApplicable(
                f"{type(host.model).__name__} has no linear of role q to read queries from; take "
                "method.attn_kind=parallel."
            )
        return find_sites(host.model, host.layout, "q")[0]


def direct_prefix(P: int) -> PrefixTuning:
    """P keys and values without a map; tokens keep their positions."""
    return PrefixTuning(prefix_length=P, prefix_projection=False, position_offset="zero")


def graft_prefix(host: Host, prefix: PrefixTuning, data: Calibration | None) -> None:
    """Add a prefix; one without a map starts at N(0, 0.02^2)."""
    counts = dict(host.matched[host.building])
    prefix.setup(host, data)
    host.matched[host.building] = counts | host.matched[host.building]
    for delta in prefixes_of(host, host.building):
        if delta.W is not None:
            nn.init.normal_(delta.W, std=0.02)


def model_dropout(host: Host) -> float:
    """The probability with which the base drops hidden states."""
    config = cast(Any, host.model).config.get_text_config()
    names = ("hidden_dropout_prob", "hidden_dropout", "dropout", "dropout_rate", "resid_pdrop")
    return next((float(getattr(config, n)) for n in names if hasattr(config, n)), 0.0)
