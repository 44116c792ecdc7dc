"""The model as peft built it, for a moment: for peft's own functions, which look for wrappers in
the model and for the base in them. Between such moments a `Tuner` keeps the PeftModel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from peftcli.core.graft import bare, deltas_of
from peftcli.methods.bridge.allocation import Allocation
from peftcli.methods.bridge.delta import PeftDelta, PromptDelta

if TYPE_CHECKING:
    from peftcli.core.host import Host


class Tuner(nn.Module):
    """What the wrappers of an adapter share: the tuner's own modules, AdaLoRA's allocation, and the
    PeftModel that they belong to.
    """

    def __init__(self, peft_model: nn.Module) -> None:
        super().__init__()
        self.held = (peft_model,)  # no child: it has the model
        tuner = cast(nn.Module, peft_model.base_model)
        for name, child in tuner._modules.items():
            if name != "model" and child is not None:
                self.add_module(name, child)
        self.allocation = Allocation(cast(Any, tuner)) if hasattr(tuner, "rankallocator") else None


def peft_model(host: Host, name: str) -> Any:
    """The adapter's PeftModel; its wrappers are in it only while it stands `as_built`."""
    delta = deltas_of(host.model).get(name)
    if isinstance(delta, PromptDelta):
        return delta.wrapper
    return cast(Tuner, host.shared(name)).held[0]


@contextmanager
def as_built(host: Host, name: str) -> Iterator[Any]:
    """The PeftModel as peft built it: wrappers in the model, the base in them."""
    deltas = [(site.path, cast(PeftDelta, delta)) for site, delta in host.deltas(name)]
    held = peft_model(host, name)
    with bare(host.model):
        modules = [host.model.get_submodule(path) for path, _ in deltas]
        try:
            for (path, delta), module in zip(deltas, modules, strict=True):
                vars(delta.wrapper).pop(delta.slot)
                delta.wrapper._modules[delta.slot] = module
                if path:
                    put(host.model, path, delta.wrapper)
            yield held
        finally:
            for (path, delta), module in zip(deltas, modules, strict=True):
                delta.wrapper._modules.pop(delta.slot)
                vars(delta.wrapper)[delta.slot] = vars(delta)["twin"]
                if path:
                    put(host.model, path, module)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at `path`, in place of the one that is there."""
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = module
