"""Full fine-tuning: every weight trains; the baseline of every paper.

    theta' = theta - lr * update        for all theta but those that `freeze` names

Weights stay float32 while products may run in bfloat16: lr times update often lies below half a
unit in the last place of a bfloat16 weight, and would be lost. `master_weights=none` saves that
memory all the same; there is no stochastic rounding in its place. What a run changed, theta' -
theta, is what `peft-train export RUN --to delta` writes: it reads the base again, so that nothing
is kept for it while training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from transformers import PreTrainedModel

from peftcli.core.graft import is_own
from peftcli.core.method import Method
from peftcli.core.site import expression
from peftcli.errors import ConfigError

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


@dataclass(frozen=True)
class Full(Method):
    """All weights of the model train."""

    family: ClassVar[str] = "selective"
    publishes_model: ClassVar[bool] = True
    on_quantised: ClassVar[bool] = False

    freeze: tuple[str, ...] = ()
    train_embeddings: bool = True
    train_head: bool = True
    master_weights: Literal["fp32", "none"] = "fp32"

    @property
    def trains_base(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """In float32, unless the weights stay in the type of the products."""
        return self.master_weights == "fp32"

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Select every parameter that nothing freezes; tied tensors once."""
        frozen = self._frozen(host)
        names = [n for n, p in host.model.named_parameters() if p not in frozen and not is_own(n)]
        host.matched[host.building] = {"all weights": len(names)}
        host.select(names, widen=self.master_weights == "fp32")

    def _frozen(self, host: Host) -> set[Any]:
        named = dict(host.model.named_parameters(remove_duplicate=False))
        frozen = set()
        for pattern in self.freeze:
            matched = {
                p for n, p in named.items() if expression("method.freeze", pattern).search(n)
            }
            if not matched:
                raise ConfigError(
                    f"method.freeze: {pattern!r} is found in no parameter's name of this model."
                )
            frozen |= matched
        model = cast(PreTrainedModel, host.model)
        if not self.train_embeddings:
            frozen |= set(model.get_input_embeddings().parameters())
        head = model.get_output_embeddings()
        if not self.train_head and head is not None:
            frozen |= set(head.parameters())
        return frozen
