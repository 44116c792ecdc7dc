"""Method: the recipe of a paper. A frozen dataclass of hyper-parameters that holds no tensors.

The life cycle, the only order there is:

    setup(host, data)         once, before sharding: importance scores, initialisations from data,
    choose sites, graft
    stages() -> (Stage, ...)  default one; a stage names what trains, for how long
    param_groups(host, lr, weight_decay)   default: matrices decay, vectors do not
    before_step(host, t)      schedules: gates, layers drawn, ranks
      forward; loss + penalty(host); backward
    after_backward(host, t)   gradients exist, unclipped: masks, importance averages
      clip; optimizer.step; zero_grad
    after_step(host, t)       prune, regrow, proximal step, reallocate; may ask
    host.reset_optimizer(params) finish(host)              before export: fold what folds, drop what
    only training needed

Every hook has an empty default; most methods write only `build(site)`. All state that must survive
a restart is a parameter or a buffer of a Delta, so resuming costs a method no code. Hooks run on
every rank in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from peftcli.core.delta import Delta
from peftcli.core.graft import deltas_of
from peftcli.core.site import Site

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


@dataclass(frozen=True)
class Step:
    """Where training is: optimizer step `index` of `total`, from 0; `epoch` as a fraction."""

    index: int
    total: int
    epoch: float


@dataclass(frozen=True)
class Stage:
    """A part of the training; `share` of all optimizer steps."""

    name: str = "train"
    share: float = 1.0


@dataclass(frozen=True)
class Method:
    """Hyper-parameters and hooks; see the module's docstring for the life cycle.

    `peft_type`, `hf_fields` and the `hf_*` hooks speak of Hugging Face peft's file format, where it
    can hold what the method trained; else the adapter is written in our own, which needs no code.
    """

    family: ClassVar[str] = ""
    modalities: ClassVar[tuple[str, ...]] = ("text", "image")  # kinds of data that it trains on
    peft_type: ClassVar[str | None] = None  # name in Hugging Face peft, where it has the method
    also_reads: ClassVar[tuple[str, ...]] = ()  # further types of peft's files that mean it
    hf_fields: ClassVar[Mapping[str, str]] = {}  # our field: peft's field
    hf_harmless: ClassVar[frozenset[str]] = (
        frozenset()
    )  # peft's fields that do not change what a loaded adapter computes
    starts_at_base: ClassVar[bool] = (
        True  # before the first step the adapted model computes what the base does
    )
    trains_base: ClassVar[bool] = (
        False  # trains most weights of the base itself, so all are kept in float32
    )
    publishes_model: ClassVar[bool] = False  # what others get is the whole model, not an adapter
    lays_tokens: ClassVar[bool] = False  # lays tokens of its own before a row: rows are not packed
    packs: ClassVar[bool] = True  # takes several examples in one row
    fills_mask: ClassVar[bool] = False  # answers classes by words, through a masked-language head
    on_quantised: ClassVar[bool] = True  # trains on a base of few bits
    size_option: ClassVar[str | None] = None  # the field by which more or fewer numbers train
    patterns: ClassVar[tuple[str, ...]] = ()  # fields whose keys mean some of `target_modules`

    modules_to_save: tuple[
        str, ...
    ] = ()  # modules trained whole beside the method; fresh heads always are

    @property
    def num_chosen(self) -> int | None:
        """About how many numbers train, where the task's data choose which; None where a model's
        dimensions alone say how many.
        """
        return None

    def build(self, site: Site) -> Delta | None:
        """The delta of one site, or None to leave it alone."""
        raise NotImplementedError

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Graft `build(site)` on every site of `target_modules`. Raises `NotApplicable` where the
        model has no place for the method.

        `data` shows the task's first batches; it is None when an adapter is read from a file, whose
        tensors then take the place of what `setup` drew.
        """
        targets = cast(Any, self).target_modules  # a field of every method that builds deltas
        for site in host.find(targets):
            if (delta := self.build(site)) is not None:
                host.graft(site, delta)

    def published(self, host: Host, name: str) -> Method:
        """The method as an adapter's file names it: what the data decided in `setup` (ranks, sites)
        is written out, so that the shapes are the same without them.
        """
        return self

    def optimizer(self, groups: list[dict[str, Any]]) -> Optimizer | None:
        """An optimizer that belongs to the method, over `param_groups`; None: the run's own."""
        return None

    def stages(self) -> tuple[Stage, ...]:
        """The parts of the training, in order."""
        return (Stage(),)

    def decaying(self, host: Host) -> set[nn.Parameter]:
        """What weight decay pulls to zero: matrices, not biases, norms and scales (fewer than two
        dimensions).
        """
        return {p for p in host.trained().values() if p.ndim >= 2}

    def param_groups(self, host: Host, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups: what decays, and the rest."""
        decaying, trained = self.decaying(host), host.trained().values()
        groups = [
            {"params": [p for p in trained if p in decaying], "weight_decay": weight_decay},
            {"params": [p for p in trained if p not in decaying], "weight_decay": 0.0},
        ]
        return [{**group, "lr": lr} for group in groups if group["params"]]

    def before_step(self, host: Host, t: Step) -> None:
        """Before the forward pass of step `t`."""

    def penalty(self, host: Host) -> Tensor | None:
        """A term added to the mean loss of the step, or None; it is logged beside the loss."""
        return None

    def after_backward(self, host: Host, t: Step) -> None:
        """When all gradients of the step exist, unclipped."""

    def after_step(self, host: Host, t: Step) -> None:
        """After the optimizer's step."""

    def finish(self, host: Host) -> None:
        """Before export."""

    def before_merge(self, host: Host, name: str) -> None:
        """Before the whole model is saved merged: fold by hand what is no matter of single layers,
        and take it off.
        """

    def hf_refuses(self, host: Host, name: str) -> str | None:
        """Why Hugging Face peft's format cannot hold this adapter, or None where it can."""
        return None if self.peft_type else "peft has no such method"

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """Fields of peft's `adapter_config.json` beyond those that `hf_fields` renames."""
        return {}

    def hf_module(self, module: nn.Module, delta: Delta) -> dict[str, Tensor]:
        """The tensors of one module's delta under peft's keys; loading writes into them."""
        tensors = {**dict(delta.named_parameters()), **dict(delta.named_buffers())}
        return {theirs: tensors[ours] for ours, theirs in delta.hf_keys.items()}

    def hf_tensors(self, host: Host, name: str) -> dict[str, Tensor]:
        """All tensors of the adapter under peft's keys, without its prefix; loading writes into
        them.
        """
        tensors = {}
        for path in dict.fromkeys(site.path for site in host.sites[name]):
            module = host.model.get_submodule(path)
            for key, tensor in self.hf_module(module, deltas_of(module)[name]).items():
                tensors[f"{path}.{key}"] = tensor
        return tensors

    def load_hf(self, host: Host, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy peft's tensors, named and shaped as in `hf_tensors`, into the deltas."""
        for key, place in self.hf_tensors(host, name).items():
            place.copy_(tensors[key])

    @classmethod
    def reads_hf(cls, config: Mapping[str, Any]) -> bool:
        """Whether this method is the one that peft's configuration of `peft_type` means."""
        return True

    @classmethod
    def hf_acting(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """The tensors of peft's file without what never acts (rows of prompts that peft allocates
        and does not use).
        """
        return tensors

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields read from peft's configuration beyond those that `hf_fields` renames."""
        return {}
