"""The bridge to Hugging Face peft (Mangrulkar et al. 2022, github.com/huggingface/peft): every
tuner of the installed version, by its own name and with its own configuration.

    y = tuner(x; layer)

peft replaces the modules of a model by wrappers that hold them. Here each wrapper is taken out
again and grafted on the module that it wrapped, as a Delta: the wrapper keeps its own forward and
calls the module through a twin of it that shares its weights. So the base keeps its names, and
state, checkpoints, switching, merging and publishing are those of every other method. What peft
itself must see - its file format, its schedules - it is shown for a moment as it built it.

Ranks, scales and starts are peft's own. What it does outside of its wrappers is done in our life
cycle: AdaLoRA's regulariser and its allocation of ranks after every step (on gradients before
clipping), in as many steps as the run has where `total_step` is not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor

from peftcli.core.method import Method, Step
from peftcli.core.site import find_sites
from peftcli.errors import ConfigError
from peftcli.methods.bridge import allocation
from peftcli.methods.bridge.as_built import Tuner, as_built, peft_model
from peftcli.methods.bridge.delta import PeftDelta
from peftcli.methods.bridge.fields import (
    INNER,
    OURS,
    PROMPTS,
    check,
    fields_of,
    make_config,
    plain,
    quiet,
)
from peftcli.methods.bridge.wrapping import wrap_model, wrap_modules

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


@dataclass(frozen=True)
class HFPeft(Method):
    """A tuner of Hugging Face peft under its own name, with its own fields in `config`."""

    family: ClassVar[str] = "bridge"
    hf_fields: ClassVar[Mapping[str, str]] = {}

    peft_type: str = "LORA"  # pyright: ignore[reportIncompatibleVariableOverride]
    config: dict[str, Any] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuse what peft does not have, before anything is loaded."""
        check(self.peft_type, self.config, self.target_modules)

    @property
    def lays_tokens(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Prompts lie before every row."""
        return self.peft_type in PROMPTS

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Let peft build its wrappers, and graft each on the module that it wrapped."""
        if len(host.adapters) > 1:
            raise ConfigError("method=hf_peft must be the first adapter on a model.")
        wrap = wrap_model if self.peft_type in PROMPTS else wrap_modules
        wrap(host, self._config(host), self.peft_type)

    def _config(self, host: Host) -> Any:
        values = dict(self.config)
        if self.target_modules is not None:
            sites, host.matched[host.building] = find_sites(
                host.model, host.layout, self.target_modules
            )
            values["target_modules"] = list(dict.fromkeys(site.path for site in sites))
        if self.peft_type == "ADALORA":
            values.setdefault("total_step", allocation.UNKNOWN_STEPS)
        return make_config(self.peft_type, values)

    def _name(self, host: Host) -> str:
        return next(name for name, method in host.adapters.items() if method is self)

    # -- AdaLoRA -----------------------------------------------------------------------------------
    def before_step(self, host: Host, t: Step) -> None:
        """AdaLoRA counts down over the run's own steps, where `total_step` is not given."""
        if self.peft_type == "ADALORA":
            config = peft_model(host, self._name(host)).peft_config[INNER]
            allocation.set_length(config, self.config.get("total_step") or t.total)

    def penalty(self, host: Host) -> Tensor | None:
        """AdaLoRA: w * mean of |A A^T - I| and |B^T B - I| over all A and B."""
        if self.peft_type != "ADALORA":
            return None
        name = self._name(host)
        wrappers = [cast(PeftDelta, delta).wrapper for _, delta in host.deltas(name)]
        weight = peft_model(host, name).peft_config[INNER].orth_reg_weight
        return weight * allocation.orthogonality(wrappers)

    def after_backward(self, host: Host, t: Step) -> None:
        """AdaLoRA weighs triplets by their gradients, which are gone after the step."""
        if self.peft_type == "ADALORA":
            averages = self._averages(host)
            with as_built(host, self._name(host)) as held:
                averages.keep_gradients(held.base_model.model)

    def after_step(self, host: Host, t: Step) -> None:
        """AdaLoRA allocates its ranks, as peft does between `optimizer.step` and `zero_grad`."""
        if self.peft_type == "ADALORA":
            averages = self._averages(host)
            with as_built(host, self._name(host)) as held:
                averages.allocate(held.base_model, t.index)

    def _averages(self, host: Host) -> allocation.Allocation:
        averages = cast(Tuner, host.shared(self._name(host))).allocation
        assert averages is not None
        return averages

    # -- peft's own files --------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """Never: it is peft's own."""
        return None

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """peft's configuration as peft writes it."""
        values = peft_model(host, name).peft_config[INNER].to_dict()
        ours = OURS - {"peft_version", "auto_mapping"}
        return {k: plain(v) for k, v in values.items() if k not in ours}

    def hf_tensors(self, host: Host, name: str) -> dict[str, Tensor]:
        """What peft itself saves of the model as it built it."""
        import peft

        with as_built(host, name) as held:
            saved = peft.get_peft_model_state_dict(held, save_embedding_layers=False)
        return {key.removeprefix("base_model.model."): t for key, t in saved.items()}

    def load_hf(self, host: Host, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Let peft itself put its tensors in place."""
        import peft

        alone = ("prompt_", "base_model.")  # prompts, and what the wrappers share
        named = {
            key if key.startswith(alone) else f"base_model.model.{key}": tensors[key]
            for key in self.hf_tensors(host, name)
        }
        with as_built(host, name) as held, quiet():
            peft.set_peft_model_state_dict(held, named)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """peft's fields as they are in its file."""
        known = fields_of(config["peft_type"])
        dropped = OURS - {"layer_replication"}
        values = {k: v for k, v in config.items() if k in known and k not in dropped}
        if config["peft_type"] in PROMPTS:
            values["inference_mode"] = True  # the prompt itself was saved, not what made it
        return {"peft_type": config["peft_type"], "config": values, "target_modules": None}
