"""Mix-And-Match adapter: Towards a Unified View of Parameter-Efficient Transfer Learning. He, Zhou
et al., ICLR 2022, arXiv 2110.04366.

    attention_l(x) = softmax(Q [P_k; K]' / sqrt(D) + mask) [P_v; V]          P_k, P_v (P, D)
    y = FFN(x) + s (drop(ReLU(x W_down + b_down)) W_up + b_up)      W_down (D, R), W_up (R, D)

A short prefix in every attention, which a small budget serves best, plus a wide scaled parallel
adapter beside every feed-forward part, which a large budget serves best: the union of
`prefix_tuning` and `parallel_adapter`, with one learning rate.

While it trains the prefix comes out of a map (`prefix_mlp`), which is folded at the end; without
one it starts at N(0, 0.02^2). The start is not the base: the prefix takes its share of the softmax
at once. Tokens keep their positions. The paper's RoBERTa code also makes maps and adapters that
nothing reads; here are none. Hugging Face peft has no such union, and its prefix moves the tokens'
positions, so the adapter is kept in our own format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge, Lt

from peftcli.core.method import Method
from peftcli.errors import ConfigError
from peftcli.methods.parallel_adapter import ParallelAdapter, graft_prefix
from peftcli.methods.prefix import fold_prefixes, prefixes_of
from peftcli.methods.prefix_tuning import PrefixTuning

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


@dataclass(frozen=True)
class MAM(Method):
    """A prefix in every attention and a parallel adapter beside every feed-forward part."""

    family: ClassVar[str] = "adapter"
    size_option: ClassVar[str | None] = "ffn_r"
    starts_at_base: ClassVar[bool] = False

    prefix_length: Annotated[int, Ge(0)] = 30
    prefix_mid_dim: Annotated[int, Ge(1)] = 800
    prefix_mlp: bool = True
    prefix_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    ffn_r: Annotated[int, Ge(0)] = 512
    ffn_scale: float | Literal["learned"] = 4.0
    ffn_init: Literal["lora", "bert"] = "lora"

    @property
    def _prefix(self) -> PrefixTuning:
        return PrefixTuning(
            prefix_length=self.prefix_length,
            prefix_projection=self.prefix_mlp,
            mid_dim=self.prefix_mid_dim,
            prefix_dropout=self.prefix_dropout,
            position_offset="zero",
        )

    @property
    def _ffn(self) -> ParallelAdapter:
        return ParallelAdapter(ffn_r=self.ffn_r, ffn_scale=self.ffn_scale, ffn_init=self.ffn_init)

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Both parts, under one name."""
        if not self.prefix_length and not self.ffn_r:
            raise ConfigError("method.prefix_length=0 and method.ffn_r=0 leave nothing to train.")
        if self.prefix_length:
            graft_prefix(host, self._prefix, data)
        if self.ffn_r:
            self._ffn.setup(host, data)

    def finish(self, host: Host) -> None:
        """Fold the map: what is kept of the prefix are P_k and P_v."""
        for name, method in host.adapters.items():
            if method is self and self.prefix_length and self.prefix_mlp:
                fold_prefixes(host, name)

    def published(self, host: Host, name: str) -> Method:
        """Without the map, once it is folded."""
        folded = all(delta.B is None for delta in prefixes_of(host, name))
        return replace(self, prefix_mlp=self.prefix_mlp and not folded)

    def hf_refuses(self, host: Host, name: str) -> str | None:
        """peft has one part or the other, and moves tokens behind a prefix."""
        if not self.prefix_length:
            return super().hf_refuses(host, name)
        if self.ffn_r:
            return "peft has no adapter of a prefix and branches beside feed-forward parts together"
        return self._prefix.hf_refuses(host, name)
