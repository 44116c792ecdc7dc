"""Folding active deltas into the weights, and back.

A norm without a bias (RMSNorm) has no place for a shift. The linears that read the norm have: what
it adds to their input, W b of each, goes into their biases. Which they are is seen by running the
model on a few tokens; that nothing else reads the norm, by running it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcli.core import weights
from peftcli.core.delta import NotMergeable
from peftcli.core.graft import active_of, bare_class, fold, is_own
from peftcli.core.layer import Bare
from peftcli.errors import ConfigError

Weights = dict[str, tuple[Tensor, Tensor | None]]  # path: W (O, I), b (O,)
APART = "keep the adapter apart (--to adapter)"


def folded(model: nn.Module) -> Weights:
    """The weights of all grafted modules under their active deltas; a shift of a norm that has no
    bias is in those of its readers.

    Raises `ConfigError` where an equation does not fold, or where a weight is shared with another
    module.
    """
    found: Weights = {}
    holders = _holders(model)
    for path, module in model.named_modules():
        if not active_of(module):
            continue
        if weights.is_quantised(module):
            raise ConfigError(
                f"{path} is stored in {weights.bits(module)} bits: merging would round the adapter "
                "away. Keep it apart (--to adapter), or merge into the original weights "
                "(quantization=none)."
            )
        if not hasattr(module, "weight"):
            raise ConfigError(
                f"{path or 'the model'}: what sits on a whole {type(module).__name__} does not "
                f"fold into a weight; {APART}"
            )
        layer = fold(Bare(module, bare_class(module)), module)
        try:
            found[path] = (layer.weight, layer.bias)
        except NotMergeable as e:
            raise ConfigError(f"{path}: {e}; {APART}") from None
        _refuse_shared(holders, path, module)
    _pass_on_shifts(model, found)
    return found


@torch.no_grad()
def write(model: nn.Module) -> Weights:
    """Fold the active deltas into the weights; returns what these were, as they are stored. Raises
    as `folded` does.
    """
    kept: Weights = {}
    for path, (W, b) in folded(model).items():
        module = model.get_submodule(path)
        bias = getattr(module, "bias", None)
        kept[path] = (weights.weight_of(module).clone(), None if bias is None else bias.clone())
        weights.write(module, W, b)
    return kept


@torch.no_grad()
def restore(model: nn.Module, kept: Weights) -> None:
    """Put back the weights that `write` gave."""
    for path, (W, b) in kept.items():
        module = model.get_submodule(path)
        weights.weight_of(module).copy_(W)
        if b is not None:
            module.get_parameter("bias").copy_(b)
        elif getattr(module, "bias", None) is not None:
            module.register_parameter("bias", None)


def _holders(model: nn.Module) -> dict[Any, dict[nn.Module, str]]:
    """For each weight the modules that have it, with their paths."""
    found: dict[Any, dict[nn.Module, str]] = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and not is_own(path):
            found.setdefault(weight, {})[module] = path
    return found


def _refuse_shared(holders: dict[Any, dict[nn.Module, str]], path: str, module: nn.Module) -> None:
    for other, other_path in holders.get(module.weight, {}).items():
        if other is not module:
            raise ConfigError(
                f"{path} shares its weight with {other_path} (tied embeddings): merging would "
                "change both. Leave it out of method.target_modules, or keep the adapter apart."
            )


def _pass_on_shifts(model: nn.Module, found: Weights) -> None:
    """Take each shift that has no place where it is into the biases of the linears behind it."""
    shifts = {
        path: b
        for path, (_, b) in found.items()
        if b is not None and not hasattr(model.get_submodule(path), "bias")
    }
    if not shifts:
        return
    if cast(Any, model).main_input_name != "input_ids":
        raise ConfigError(f"{next(iter(shifts))}: has no bias, so a shift does not fold; {APART}")
    for path, linears in readers(model, list(shifts)).items():
        found[path] = (found[path][0], None)
        for linear in linears:
            module: Any = model.get_submodule(linear)
            if weights.is_quantised(module):
                raise ConfigError(f"{linear} is quantised and takes no shift; {APART}")
            W, b = found.get(linear, (weights.dense(module), module.bias))
            moved = W @ shifts[path].to(W.dtype)
            found[linear] = (W, moved if b is None else b + moved)


def readers(model: nn.Module, sources: Sequence[str]) -> dict[str, list[str]]:
    """For each source module the linears whose input is its output, or a view of it.

    Raises `ConfigError` where none does, or something else too.
    """
    found, answer = _watched(model, sources)
    if unread := [path for path in sources if not found[path]]:
        raise ConfigError(
            f"{unread[0]}: a shift behind a norm without a bias, which no linear reads, does not "
            f"fold; {APART}"
        )
    again = _shifted(model, sources, [p for linears in found.values() for p in linears])
    tolerance = 5e-2 if answer.dtype == torch.bfloat16 else 1e-3
    if (again - answer).abs().max() > tolerance * answer.abs().max():
        raise ConfigError(
            f"{sources[0]} and its like: their shifts reach more than the linears behind them "
            f"({', '.join(found[sources[0]])}), so they do not fold into biases; {APART}"
        )
    return found


def _watched(model: nn.Module, sources: Sequence[str]) -> tuple[dict[str, list[str]], Tensor]:
    """The linears that read each source while the model answers, and the answer."""
    found: dict[str, list[str]] = {path: [] for path in sources}
    made_by: dict[int, str] = {}
    held: list[Tensor] = []  # so that no other tensor gets the memory of one of them

    def produced(path: str, module: nn.Module, args: Any, output: Tensor) -> None:
        held.append(output)
        made_by[_memory(output)] = path

    def consumed(path: str, module: nn.Module, args: Any) -> None:
        if args and (source := made_by.get(_memory(args[0]))):
            found[source].append(path)

    modules = dict(model.named_modules())
    linears = [p for p, m in modules.items() if isinstance(m, nn.Linear | Conv1D) and not is_own(p)]
    hooks = [modules[p].register_forward_hook(partial(produced, p)) for p in sources]
    hooks += [modules[p].register_forward_pre_hook(partial(consumed, p)) for p in linears]
    return found, _answer(model, hooks)


def _shifted(model: nn.Module, sources: Sequence[str], linears: Sequence[str]) -> Tensor:
    """The answer when a vector is added to the sources' outputs, and taken off again before the
    linears: the same, where nothing else reads the sources.
    """
    hooks = [model.get_submodule(p).register_forward_hook(_add) for p in sources]
    hooks += [model.get_submodule(p).register_forward_pre_hook(_subtract) for p in linears]
    return _answer(model, hooks)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output + _ramp(output)


def _subtract(module: nn.Module, args: Any) -> Any:
    return (args[0] - _ramp(args[0]), *args[1:])


def _ramp(x: Tensor) -> Tensor:
    """A vector (C,) of the size of numbers behind a norm."""
    return torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype, device=x.device)


@torch.no_grad()
def _answer(model: Any, hooks: Sequence[Any]) -> Tensor:
    """What the model says of a few tokens under the hooks, which are removed."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        return model(**{k: v.to(device) for k, v in model.dummy_inputs.items()})[0]
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
