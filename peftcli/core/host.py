"""Host: the adapted model. It knows the sites, which adapters are there and active, what trains,
and how all of it is frozen, merged, saved and loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftcli.core import merge, state, weights
from peftcli.core.delta import Delta
from peftcli.core.graft import (
    SHARED,
    activate,
    active_of,
    bare,
    deltas_of,
    graft,
    is_grafted,
    is_own,
    prune,
)
from peftcli.core.method import Method
from peftcli.core.rows import RowsDelta
from peftcli.core.scores import Calibration
from peftcli.core.shares import Share
from peftcli.core.site import Site, find_places, find_sites
from peftcli.core.sublayer import Sublayer, find_sublayers
from peftcli.dist.ranks import Ranks
from peftcli.errors import ConfigError, did_you_mean
from peftcli.models.files import read_weight
from peftcli.models.roles import layout

TRAINING = "|training"  # behind the name of an adapter: what only its training needs


class Host:
    """A model whose weights are frozen but for the adapters' deltas and what is selected.

    `new_modules` are modules whose weights came from no file (a fresh classification head): they
    always train, in float32, and are saved with the adapter.
    """

    def __init__(self, model: nn.Module, new_modules: Sequence[str] = ()) -> None:
        self.model = model.requires_grad_(False)
        self.layout = layout(model)
        self.adapters: dict[str, Method] = {}
        self.sites: dict[str, list[Site]] = {}  # adapter: its sites
        self.matched: dict[str, dict[str, int]] = {}  # adapter: target entry -> number of sites
        self.reset_requests: list[nn.Parameter] = []
        self.optimizer: Optimizer | None = None  # the run's, once it is made
        self.ranks = Ranks()  # the processes that train it; scores are summed over them
        self._selected: dict[str, set[str]] = {}  # parameter: the adapters that train it
        self._saved: dict[str, set[str]] = {}  # module trained whole: the adapters that it is of
        self.shares: dict[str, Share] = {}  # of parameters that train, where ranks divide them
        self._unmerged: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.building = ""
        for path in new_modules:
            self.train_module(path)

    # -- adapters ----------------------------------------------------------------------------------
    def add(self, method: Method, name: str = "default", data: Calibration | None = None) -> None:
        """Adapt the model by `method` under `name`, on top of the adapters that are there, and
        switch it on. `data` is for methods that look at the task before they start; an adapter
        that is read from a file has none. A method that does not apply leaves the model as it was.
        """
        if name in self.adapters:
            raise ConfigError(f"an adapter named {name!r} is already here; choose another name")
        if self._unmerged:
            raise ConfigError("adapters are merged into the weights; unmerge before adding another")
        self.adapters[name], self.sites[name], self.matched[name] = method, [], {}
        self.building = name
        try:
            method.setup(self, data)
            if data is not None:  # a file of peft's may hold patterns of no effect
                self._refuse_idle_patterns(method)
            for module in method.modules_to_save:
                for path in self._modules_named(module):
                    self.train_module(path)
        except ConfigError:
            self.remove(name)
            raise

    def _refuse_idle_patterns(self, method: Method) -> None:
        for field in method.patterns:
            sites = find_sites(self.model, self.layout, vars(method)["target_modules"])[0]
            for pattern in vars(method)[field]:
                if not any(site.fits(pattern) for site in sites):
                    names = sorted({site.role or site.path for site in sites})
                    raise ConfigError(
                        f"method.{field}: {pattern!r} means none of method.target_modules, which "
                        f"are {', '.join(names)}.{did_you_mean(pattern, names)}"
                    )

    def _modules_named(self, name: str) -> list[str]:
        """Paths of the modules with this path or last name."""
        paths = [p for p, _ in self.model.named_modules() if p and not is_own(p)]
        found = [p for p in paths if p == name or p.endswith("." + name)]
        if not found:
            hint = did_you_mean(name, {p.rsplit(".", 1)[-1] for p in paths})
            raise ConfigError(
                f"method.modules_to_save: no module {name!r} in {type(self.model).__name__}.{hint}"
            )
        return found

    def remove(self, name: str) -> None:
        """Take the adapter's deltas off the model, and let rest what it alone trained of the base;
        that keeps the values it was trained to.
        """
        for path in {site.path for site in self.sites[name]}:
            prune(self.model.get_submodule(path), name)
        self.unshare(name)
        self.freeze(p for p, owners in self._selected.items() if owners == {name})
        for held in (self._selected, self._saved):
            for key, owners in list(held.items()):
                owners.discard(name)
                if not owners:
                    del held[key]
        del self.adapters[name], self.sites[name], self.matched[name]

    def find(self, targets: str | Sequence[str]) -> list[Site]:
        """The sites that `targets` mean; remembers how many each entry matched."""
        sites, counts = find_sites(self.model, self.layout, targets)
        self.matched[self.building] = counts
        return sites

    def places(self, kind: str) -> list[Site]:
        """Every `norm`, `attention`, `mlp` or `block` as a site, or the `model` itself; remembers
        how many.
        """
        sites = find_places(self.model, self.layout, kind)
        self.matched[self.building][kind] = len(sites)
        return sites

    def sublayers(self, kinds: Sequence[str], leave_out: Sequence[int] = ()) -> list[Sublayer]:
        """The sub-layers (`attn`, `cross`, `ffn`) outside the blocks `leave_out`, with their
        residuals and norms; remembers how many.
        """
        self.refuse_layers(leave_out)
        found = [
            sub
            for sub in find_sublayers(self.model, self.layout)
            if sub.kind in kinds and sub.end.layer not in leave_out
        ]
        self.matched[self.building] |= Counter(sub.kind for sub in found)
        return found

    def refuse_layers(self, leave_out: Sequence[int]) -> None:
        """Raise `ConfigError` where a layer that is to be left out is none of the model's."""
        there = {self.layout.block_of(block) for block in self.layout.blocks}
        if wrong := sorted(set(leave_out) - there):
            raise ConfigError(
                f"method.leave_out={wrong}: {type(self.model).__name__} has no such layers; they "
                f"count from 0 to {max(filter(None, there), default=0)}."
            )

    def share(self, module: nn.Module, training: bool = False) -> nn.Module:
        """Keep parameters or buffers that several deltas of the adapter that is being set up use.
        The deltas hold it in a tuple, so that it is saved and counted once. What `training` alone
        needs is in checkpoints, and in no adapter's file.
        """
        held = self._shared()
        self.model._modules[SHARED] = held
        held[self.building + TRAINING * training] = module
        return module

    def unshare(self, name: str) -> None:
        """Drop what the adapter's deltas shared, once none of them uses it."""
        shared = self._shared()
        for key in (name, name + TRAINING):
            if key in shared:
                del shared[key]
        if not shared:
            self.model._modules.pop(SHARED, None)

    def shared(self, name: str = "default", training: bool = False) -> nn.Module:
        """What the adapter's deltas share."""
        return self._shared()[name + TRAINING * training]

    def _shared(self) -> nn.ModuleDict:
        held = self.model._modules.get(SHARED)
        return held if isinstance(held, nn.ModuleDict) else nn.ModuleDict()

    def graft(self, site: Site, delta: Delta) -> None:
        """Put the delta of the adapter that is being set up on its site, on the site's device."""
        delta = delta.to(site.device)
        self.sites[self.building].append(site)
        if site.rows is None:
            graft(site.module, self.building, delta)
            return
        if self.building not in deltas_of(site.module):
            rows = RowsDelta(weights.shape(site.module)[0])
            graft(site.module, self.building, rows.to(site.device))
        held = deltas_of(site.module)[self.building]
        assert isinstance(held, RowsDelta)
        assert site.role is not None
        held.add(site.role, site.rows, delta)

    def original_weight(self, site: Site) -> Tensor | None:
        """The float32 weight (d_out, d_in) that a quantised site was made of, read from the model's
        folder; None where it is not there.
        """
        model: Any = self.model
        key = f"{site.path}.weight"
        names = [key, key.removeprefix(f"{model.base_model_prefix}.")]
        W = read_weight(Path(str(model.name_or_path)), names)
        if W is None or tuple(W.shape) != weights.shape(site.module):
            return None
        W = W.to(site.device, torch.float32)
        return W if site.rows is None else torch.cat([W[a:b] for a, b in site.rows])

    def delta(self, site: Site, name: str = "default") -> Delta:
        """The delta of the adapter at the site."""
        held = deltas_of(site.module)[name]
        return held.part(site.role) if isinstance(held, RowsDelta) else held

    def deltas(self, name: str = "default") -> Iterator[tuple[Site, Delta]]:
        """Every site of the adapter with its delta, in the model's order."""
        for site in self.sites[name]:
            yield site, self.delta(site, name)

    @property
    def active(self) -> tuple[str, ...]:
        """The adapters that are switched on, in the order in which they are bound."""
        on = {n for m in self.model.modules() for n in active_of(m)}
        return tuple(n for n in self.adapters if n in on)

    def activate(self, *names: str) -> None:
        """Switch on exactly these adapters, bound in this order; none: the base."""
        for name in names:
            if name not in self.adapters:
                raise ConfigError(
                    f"no adapter {name!r}; there are "
                    f"{sorted(self.adapters)}.{did_you_mean(name, self.adapters)}"
                )
        for module in self.model.modules():
            if is_grafted(module):
                activate(module, names)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base alone, for the length of the block."""
        held = self.active
        self.activate()
        try:
            yield
        finally:
            self.activate(*held)

    # -- what trains -------------------------------------------------------------------------------
    def train_module(self, path: str) -> None:
        """Train the module's own weights whole, in float32, and save them with the adapter."""
        module = self.model.get_submodule(path).float()
        self._saved.setdefault(path, set()).add(self.building)
        self.select(f"{path}.{name}" for name, _ in module.named_parameters())

    def select(self, names: Iterable[str], *, widen: bool = True) -> None:
        """Train these parameters of the base itself. They are made float32 (`widen`): updates are
        smaller than bfloat16 resolves. Raises `ConfigError`, before it changes any, where one is
        quantised.
        """
        parameters = {name: self.model.get_parameter(name) for name in names}
        for name, parameter in parameters.items():
            if not parameter.is_floating_point():
                raise ConfigError(
                    f"{name} is stored in few bits ({parameter.dtype}): quantised weights cannot "
                    "be trained."
                )
        for name, parameter in parameters.items():
            parameter.requires_grad_(True)
            self._selected.setdefault(name, set()).add(self.building)
            if not widen:
                continue
            parameter.data = parameter.data.float()
            owner = self.model.get_submodule(name.rpartition(".")[0])
            scale = owner._parameters.get("weight")
            if scale is not None and scale.ndim == 1:  # a norm takes all of its own in one type
                scale.data = scale.data.float()
                if (shift := owner._parameters.get("bias")) is not None:
                    shift.data = shift.data.float()
            if next(owner.children(), None) is not None:  # a token in the stream, now float32
                for path in (p for p, role in self.layout.names.items() if role == "norm"):
                    self.model.get_submodule(path).float()

    def freeze(self, names: Iterable[str]) -> None:
        """Let selected parameters rest: they keep their values and stay in the state, get no
        gradient and no update.
        """
        for name in names:
            parameter = self.model.get_parameter(name)
            parameter.requires_grad_(False)
            parameter.grad = None

    def thaw(self, names: Iterable[str]) -> None:
        """Train selected parameters again."""
        for name in names:
            self.model.get_parameter(name).requires_grad_(True)

    @property
    def saved_modules(self) -> tuple[str, ...]:
        """Paths of the modules that train whole, first come first."""
        return tuple(self._saved)

    @property
    def selected(self) -> tuple[str, ...]:
        """Names of the base's own parameters that train or may train, sorted."""
        return tuple(sorted(self._selected))

    def trained(self) -> dict[str, nn.Parameter]:
        """Everything that trains, by name in sorted order, so that every rank sees the same; tied
        tensors once.
        """
        return {n: p for n, p in sorted(self.model.named_parameters()) if p.requires_grad}

    def stepped(self) -> dict[str, nn.Parameter]:
        """Every parameter by name, as the optimizer knows it: this rank's share of it, where there
        is one.
        """
        own = {name: share.own for name, share in self.shares.items()}
        return {**dict(self.model.named_parameters()), **own}

    def _own(self) -> dict[nn.Parameter, nn.Parameter]:
        """Parameters of the model that ranks divide: what the optimizer has of them."""
        return {share.parameter: share.own for share in self.shares.values()}

    def reset_optimizer(self, parameters: Iterable[nn.Parameter]) -> None:
        """Ask the loop to forget the optimizer's state of these parameters before the next step."""
        own = self._own()
        self.reset_requests.extend(own.get(p, p) for p in parameters)

    def optimizer_state(self, parameter: nn.Parameter) -> dict[str, Any]:
        """What the run's optimizer keeps of the parameter; what a method adds there is in every
        checkpoint, and in no adapter's file.
        """
        assert self.optimizer is not None, "no optimizer yet"
        return self.optimizer.state[self._own().get(parameter, parameter)]

    def recompute_activations(self) -> None:
        """Recompute activations in the backward pass instead of keeping them (gradient
        checkpointing).
        """
        verbs = (
            "activation_checkpointing_enable",
            "gradient_checkpointing_enable",
        )  # renamed in transformers 5.23
        verb = next((v for v in verbs if hasattr(self.model, v)), None)
        if verb is None or not getattr(self.model, "supports_gradient_checkpointing", False):
            raise ConfigError(
                f"trainer.gradient_checkpointing=true: {type(self.model).__name__} does not "
                "support it."
            )
        getattr(self.model, verb)()

    def num_parameters(self) -> tuple[int, int]:
        """(trained, all), tied tensors once."""
        counts = [(n, p.requires_grad) for p, n in weights.sizes(self.model).items()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    # -- state -------------------------------------------------------------------------------------
    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint holds of the model, one by one: the deltas' parameters and buffers and
        the selected weights. What ranks divide is gathered when its turn comes: all go through.
        """
        for name, tensor in self._state().items():
            share = self.shares.get(name)
            yield name, share.whole() if share else tensor

    def state(self) -> dict[str, Tensor]:
        """All of `named_state` at once."""
        return dict(self.named_state())

    def _state(self) -> dict[str, Tensor]:
        """The state as it lies in the model."""
        return state.of_model(self.model, self._selected)

    def digest(self) -> str:
        """A hash of what no file of the base holds: the adapters' tensors, and modules that are
        trained whole.
        """
        whole = tuple(f"{path}." for path in self.saved_modules)
        return state.digest(
            (n, t) for n, t in self.named_state() if is_own(n) or n.startswith(whole)
        )

    def adapter_state(self, name: str = "default") -> dict[str, Tensor]:
        """What a file holds of one adapter: its part of the state, under names without `name`, and
        the selected weights.
        """
        return state.of_adapter(self._state(), name)

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        """Copy `saved` into the model; names and shapes must be exactly those of `state()`."""
        state.fill(self._state(), saved, self.shares)

    # -- merging -----------------------------------------------------------------------------------
    def merge(self) -> None:
        """Fold the active deltas into the weights. The folded modules' weights are kept aside, so
        that `unmerge` is exact.

        Raises `ConfigError` where an equation does not fold, or where the weight is shared with
        another module.
        """
        self._unmerged = merge.write(self.model)
        self.activate()

    def unmerge(self) -> None:
        """Put back the weights that `merge` kept aside and switch every adapter on."""
        merge.restore(self.model, self._unmerged)
        self._unmerged = {}
        self.activate(*self.adapters)

    def bare(self) -> Any:
        """Context manager: the model without its grafts, for saving the base."""
        return bare(self.model)
