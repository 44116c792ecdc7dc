"""AutoPEFT: Automatic Configuration Search for Parameter-Efficient Fine-Tuning. Zhou, Wan, Vulic
and Korhonen, TACL 2024, arXiv 2301.12132.

    y = FFN(h)        y' = y + s_p W_up relu(W_down h) + V_up relu(V_down y)
    attention(x) = softmax(Q [P_k; K]' / sqrt(D) + mask) [P_v; V]

A parallel adapter, a serial adapter and a prefix in the same layers, each of a size of its own,
some layers with none of them: a space that holds the known designs and mixtures between them. Which
point of it trains the fewest parameters for a score differs from task to task, so it is searched:
`recipes/autopeft_minilm.yaml` looks for the Pareto front of accuracy and size.

Sizes are D / 2^k for k = 0..8, then 1 and 0, in the paper's search; of L layers of width D the
three parts train 2 L D (serial_r + ffn_r + prefix_length) numbers beside biases and the map that
makes the prefix, which is folded at the end. The paper searches by Bayesian optimisation with
Gaussian processes; here any `sweep.search` does, TPE for two metrics. The sizes that stand here
without a search are ours. The parallel branch drops like the base (see `parallel_adapter`), the
serial one reads y alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Ge

from peftcli.core.sublayer import find_sublayers
from peftcli.errors import ConfigError
from peftcli.methods.bottleneck_adapter import BottleneckAdapter
from peftcli.methods.mam import MAM
from peftcli.methods.parallel_adapter import ParallelAdapter
from peftcli.methods.prefix_tuning import PrefixTuning

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


@dataclass(frozen=True)
class AutoPEFT(MAM):
    """The mix of prefix and parallel adapter with a serial adapter, in chosen layers."""

    family: ClassVar[str] = "adapter"

    prefix_length: Annotated[int, Ge(0)] = 1
    ffn_r: Annotated[int, Ge(0)] = 24
    ffn_init: Literal["lora", "bert"] = "bert"
    serial_r: Annotated[int, Ge(0)] = 12
    leave_out: dict[str, bool] = field(default_factory=dict)

    @property
    def left_out(self) -> tuple[int, ...]:
        """The layers without any part."""
        return tuple(sorted(int(layer) for layer, is_out in self.leave_out.items() if is_out))

    @property
    def _prefix(self) -> PrefixTuning:
        return replace(super()._prefix, leave_out=self.left_out)

    @property
    def _ffn(self) -> ParallelAdapter:
        return replace(super()._ffn, leave_out=self.left_out)

    @property
    def _serial(self) -> BottleneckAdapter:
        return BottleneckAdapter(
            preset="pfeiffer",
            bottleneck_dim=self.serial_r,
            original_ln_before=False,  # behind the feed-forward part itself
            leave_out=self.left_out,
        )

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """The serial adapters, then the two parts of the mix around them."""
        if not self.serial_r and not self.ffn_r and not self.prefix_length:
            raise ConfigError(
                "method.serial_r=0, method.ffn_r=0 and method.prefix_length=0 leave nothing to "
                "train."
            )
        layers = {str(sub.end.layer) for sub in find_sublayers(host.model, host.layout)}
        if unknown := sorted(self.leave_out.keys() - layers):
            raise ConfigError(
                f"method.leave_out: {type(host.model).__name__} has no layer {', '.join(unknown)}; "
                f"layers are 0 to {len(layers) - 1}."
            )
        if self.serial_r:
            self._serial.setup(host, data)
        if self.ffn_r or self.prefix_length:
            super().setup(host, data)
