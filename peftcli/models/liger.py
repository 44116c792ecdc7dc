"""Liger-Kernel's forms of what a base model has beside its linears - norms, rotation of queries and
keys, gated MLPs - where it is installed and the model runs on CUDA. Which forms a family of models
takes is Liger's own knowledge.

Liger puts its forward on each module itself, and its functions into the model's source for the
whole process. Here a module's class is swapped instead, as in grafting, so that deltas stand over
either form, and each call takes the form that runs on its input: `trainer.kernels=reference`, a
float64 input and a model on the CPU keep the family's own.

The rotation and the gates write over their inputs, outputs of linears, and no tensor's version
tells of it: a delta must not keep its own output for the backward pass. None does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib.util import find_spec
from types import FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcli.errors import ConfigError
from peftcli.imports import optional
from peftcli.kernels import choice

HAS_LIGER = find_spec("liger_kernel") is not None
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # the head has its own
ON_MODULES = ("forward", "extra_repr", "_get_name")  # what Liger puts there


def use_liger(model: PreTrainedModel, device: torch.device) -> list[str]:
    """Give a bare model for `device` Liger's forms; returns the classes and functions that have
    one: none where the device takes no GPU kernels, or Liger does not know the model.

    Raises `ConfigError` where `trainer.kernels=require` and Liger knows the model, but cannot take
    it, or is not installed.
    """
    if not choice.has_kernels(device):
        return []
    if not HAS_LIGER:
        return _refuse("liger-kernel is not installed (pip install 'peftcli[liger]')")
    patch = optional("liger_kernel.transformers.monkey_patch")
    if model.config.model_type not in patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return []
    sources = {m: dict(vars(m)) for name, m in sys.modules.items() if ".modeling_" in name}
    modules = [m for m in model.modules() if "forward" not in vars(m)]
    try:
        patch._apply_liger_kernel_to_instance(model=model, **LOSSES)
    except (ImportError, NotImplementedError, TypeError, ValueError) as e:  # perhaps halfway
        for source, before in sources.items():
            _restore(source, before)
        for module in modules:
            _forward_on(module)
        return _refuse(f"liger-kernel cannot take {type(model).__name__}: {e}")
    found = {name for source, before in sources.items() for name in _choose(source, before)}
    for module in modules:
        form = _forward_on(module)
        if form is None or any(p.ndim > 2 for p in module.parameters(recurse=False)):
            continue  # nothing, or a mixture's experts, whose products deltas take part in
        if hasattr(module, "in_place"):
            cast(Any, module).in_place = False  # else a norm writes over the gradient it is given
        found.add(type(module).__name__)
        module.__class__ = _with_form(type(module), form)
    return sorted(found)


def _refuse(reason: str) -> list[str]:
    """Nothing runs in Liger's forms, which is an error where it must."""
    if choice.is_required():
        raise ConfigError(f"trainer.kernels=require: {reason}. Or take trainer.kernels=auto.")
    return []


def _takes(x: Any) -> bool:
    """Whether Liger's form runs on the input."""
    if choice.is_reference() or not isinstance(x, Tensor) or x.dtype not in choice.DTYPES:
        return False
    return choice.has_kernels(x.device)


def _either(form: Callable[..., Any], plain: Callable[..., Any], at: int) -> Callable[..., Any]:
    """`form` where it runs on the argument `at`, else `plain`."""

    @wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        x = (*args, *kwargs.values())[at]
        return (form if _takes(x) else plain)(*args, **kwargs)

    cast(Any, call).plain = plain
    return call


@lru_cache(None)
def _with_form(cls: type[nn.Module], form: Callable[..., Any]) -> type[nn.Module]:
    """The subclass of `cls` that has `form` for its forward, where that runs; one for each pair."""
    forward = _either(form, cls.forward, at=1)
    body = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return cast(Any, type(cls))(cls.__name__, (cls,), body)


def _forward_on(module: nn.Module) -> Callable[..., Any] | None:
    """What Liger made the module's forward, taken off it with all else that it put there."""
    forward, *_ = [vars(module).pop(name, None) for name in ON_MODULES]
    return forward and forward.__func__


def _restore(source: ModuleType, before: dict[str, Any]) -> dict[str, Any]:
    """Undo what Liger did to a model's source; returns that."""
    now = vars(source)
    changed = {name: now[name] for name, old in before.items() if now[name] is not old}
    now.update({name: before[name] for name in changed})
    return changed


def _choose(source: ModuleType, before: dict[str, Any]) -> list[str]:
    """Undo what Liger did to a model's source, but for functions, each of which is either form from
    now on; returns their names.
    """
    changed = _restore(source, before)
    functions = [name for name in changed if isinstance(before[name], FunctionType)]
    for name in functions:
        plain = getattr(before[name], "plain", before[name])
        setattr(source, name, _either(changed[name], plain, at=0))
    return functions
