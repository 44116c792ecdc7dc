"""Grafting: a module keeps its place, its parameter names and its `isinstance`; only its class is
swapped for a cached subclass whose forward folds the active deltas over the bare forward. The
deltas become child modules.

The subclass keeps the original name, module and signature, since saving, `generate` and the choice
of a loss read them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from peftcli.core.delta import Delta
from peftcli.core.layer import Bare, Bound, Layer

SHARED = "deltas_shared"  # child of the model that holds what several deltas use


def is_own(name: str) -> bool:
    """Whether the name of a module or tensor belongs to an adapter, not to the base."""
    return any(part in ("deltas", SHARED) for part in name.split("."))


def is_grafted(module: nn.Module) -> bool:
    """Whether deltas sit on the module."""
    return hasattr(type(module), "graft_of")


def bare_class(module: nn.Module) -> type[nn.Module]:
    """The class that a grafted module had before."""
    return cast(Any, type(module)).graft_of


def deltas_of(module: nn.Module) -> dict[str, Delta]:
    """The deltas on a module by their adapters' names; none on a bare one."""
    return dict(cast(Any, module).deltas.items()) if is_grafted(module) else {}


def active_of(module: nn.Module) -> tuple[str, ...]:
    """The adapters that are switched on at a module, in the order in which they are bound."""
    return cast(Any, module).active if is_grafted(module) else ()


def activate(module: nn.Module, names: tuple[str, ...]) -> None:
    """Switch on exactly those of `names` that a grafted module has, bound in this order."""
    cast(Any, module).active = tuple(n for n in names if n in cast(Any, module).deltas)


def fold(layer: Layer, module: nn.Module) -> Layer:
    """`layer` with the module's active deltas bound on it, first to last."""
    for name in active_of(module):
        layer = Bound(cast(Any, module).deltas[name], layer)
    return layer


@lru_cache(None)
def grafted(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` whose forward folds deltas; one for each class."""
    parameters = list(inspect.signature(cls.forward).parameters)[1:]
    takes_batch = issubclass(cls, PreTrainedModel)

    @wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        key = None
        if takes_batch:
            x, args, kwargs = {**dict(zip(parameters, args, strict=False)), **kwargs}, (), {}
        elif args:
            x, args = args[0], args[1:]
        else:
            key = "hidden_states" if "hidden_states" in kwargs else parameters[0]
            x = kwargs.pop(key)
        bare = Bare(self, cls, args, kwargs, key)
        y = fold(bare, self)(x)
        return y if bare.rest is None else (y, *bare.rest)

    body = {
        "forward": forward,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "graft_of": cls,
        "__reduce_ex__": lambda self, _: (_rebuild, (cls,), self.__dict__),  # deepcopy and pickle
    }
    return cast(Any, type(cls))(cls.__name__, (cls,), body)


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    return cast(Any, grafted(cls)).__new__(grafted(cls))


def graft(module: nn.Module, name: str, delta: Delta) -> None:
    """Put `delta` on the module under the adapter's `name`, switched on, in the module's mode."""
    m = cast(Any, module)
    if not is_grafted(module):
        m.deltas, m.active = nn.ModuleDict(), ()
        m.__class__ = grafted(type(module))
    assert name not in m.deltas, f"{name} sits on this module already"
    m.deltas[name] = delta.train(module.training)
    m.active = (*m.active, name)


def prune(module: nn.Module, name: str) -> None:
    """Take the adapter's delta off the module; without any left it is what it was before."""
    m = cast(Any, module)
    del m.deltas[name]
    m.active = tuple(n for n in m.active if n != name)
    if not m.deltas:
        m.__class__ = bare_class(module)
        del m.deltas, m.active


@contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before grafting, for saving the base (a quantised `save_pretrained`
    ignores `state_dict=`).
    """
    shared = model._modules.pop(SHARED, None)
    held = [(m, type(m), m._modules.pop("deltas")) for m in list(model.modules()) if is_grafted(m)]
    for module, _, _ in held:
        module.__class__ = bare_class(module)
    try:
        yield model
    finally:
        for module, cls, deltas in held:
            module.__class__ = cls
            module._modules["deltas"] = deltas
        if shared is not None:
            model._modules[SHARED] = shared
