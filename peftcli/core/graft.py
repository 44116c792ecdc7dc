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
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from peftcli.core.delta import Delta
from peftcli.core.layer import Bare, Bound, Layer


def is_grafted(module: nn.Module) -> bool:
    """Whether deltas sit on the module."""
    return hasattr(type(module), "graft_of")


def fold(layer: Layer, module: nn.Module) -> Layer:
    """`layer` with the module's active deltas bound on it, first to last."""
    for name in module.active:
        if name in module.deltas:
            layer = Bound(module.deltas[name], layer)
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
    return type(cls)(cls.__name__, (cls,), body)


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    return grafted(cls).__new__(grafted(cls))


def graft(module: nn.Module, name: str, delta: Delta) -> None:
    """Put `delta` on the module under the adapter's `name`, switched on, in the module's mode."""
    if not is_grafted(module):
        module.deltas, module.active = nn.ModuleDict(), ()
        module.__class__ = grafted(type(module))
    if name in module.deltas:
        raise ValueError(f"an adapter named {name!r} is already here; choose another name")
    module.deltas[name] = delta.train(module.training)
    module.active = (*module.active, name)


def prune(module: nn.Module, name: str) -> None:
    """Take the adapter's delta off the module; without any left it is what it was before."""
    del module.deltas[name]
    module.active = tuple(n for n in module.active if n != name)
    if not module.deltas:
        module.__class__ = type(module).graft_of
        del module.deltas, module.active


@contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it was before grafting, for saving the base (a quantised `save_pretrained`
    ignores `state_dict=`).
    """
    held = [(m, type(m), m._modules.pop("deltas")) for m in list(model.modules()) if is_grafted(m)]
    for module, cls, _ in held:
        module.__class__ = cls.graft_of
    try:
        yield model
    finally:
        for module, cls, deltas in held:
            module.__class__ = cls
            module.deltas = deltas
