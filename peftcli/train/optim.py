"""The optimizer and the learning-rate schedule of a run."""

from __future__ import annotations

import copy
import inspect
import math
from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from peftcli.core.host import Host
from peftcli.core.method import Method
from peftcli.errors import ConfigError
from peftcli.imports import optional
from peftcli.settings import OPTIMIZERS, Scheduler
from peftcli.settings import Optimizer as OptimizerSettings
from peftcli.train.schedules import SCHEDULES, Span


def make_optimizer(settings: OptimizerSettings, method: Method, host: Host) -> Optimizer:
    """The class that `settings.cls` names, over the method's parameter groups; fused where torch
    has that.
    """
    module, _, name = settings.cls.rpartition(".")
    cls = getattr(optional(module), name)
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.kwargs.items()}
    parameters = inspect.signature(cls).parameters
    if "fused" in parameters and not kwargs.keys() & {
        "fused",
        "foreach",
        "capturable",
        "differentiable",
    }:
        kwargs["fused"] = True
    groups = method.param_groups(host, settings.lr, settings.weight_decay)
    if settings.head_lr is not None:
        groups = with_heads_apart(groups, host, settings.head_lr)
    if not groups:
        raise ConfigError("nothing trains: the method leaves no trainable parameter on this model.")
    host.optimizer = method.optimizer(groups)
    if host.optimizer is not None:
        return host.optimizer
    try:
        made = cls(groups, lr=settings.lr, weight_decay=settings.weight_decay, **kwargs)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ConfigError(f"optimizer: {name} refuses these options: {e}") from None
    host.optimizer = made
    return made


def with_heads_apart(
    groups: list[dict[str, Any]], host: Host, head_lr: float
) -> list[dict[str, Any]]:
    """The groups, with the parameters of modules that train whole in groups of their own, at
    `head_lr`. Raises `ConfigError` where there is no such module.
    """
    modules = [host.model.get_submodule(path) for path in host.saved_modules]
    heads = {p for module in modules for p in module.parameters()}
    if not heads:
        raise ConfigError(
            f"optimizer.head_lr={head_lr}: no module trains whole: the model has no fresh "
            "head, and method.modules_to_save is empty."
        )
    apart = []
    for group in groups:
        rest = [p for p in group["params"] if p not in heads]
        mine = [p for p in group["params"] if p in heads]
        apart += [{**group, "params": rest}, {**group, "params": mine, "lr": head_lr}]
    return [group for group in apart if group["params"]]


def make_scheduler(settings: Scheduler, optimizer: Optimizer, total: int) -> LRScheduler:
    """The named schedule over `total` optimizer steps."""
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(settings.warmup_ratio * total)
    if warmup > total:
        raise ConfigError(
            f"scheduler.warmup_steps={warmup} is more than the run's {total} optimizer steps."
        )
    schedule = SCHEDULES[settings.name](**settings.kwargs)
    schedule.check(span := Span(optimizer.defaults["lr"], warmup, total))
    return LambdaLR(optimizer, partial(schedule.part, span))


def clip(host: Host, max_norm: float | None) -> float:
    """Scale the gradients down to `max_norm` and return the norm (L2) that they had, over all
    ranks where they divide them.
    """
    bound = math.inf if max_norm is None else max_norm
    stepped, shares = host.stepped(), host.shares
    parameters = [stepped[n] for n in host.trained()]
    if not shares:
        return torch.nn.utils.clip_grad_norm_(parameters, bound).item()
    divided = {share.own for share in shares.values() if share.ranks.size > 1}
    (rows,) = host.ranks.totals(_norm(p for p in parameters if p in divided) ** 2)
    norm = math.sqrt(_norm(p for p in parameters if p not in divided) ** 2 + rows)
    torch.nn.utils.clip_grads_with_norm_(parameters, bound, torch.tensor(norm))
    return norm


def _norm(parameters: Iterable[torch.nn.Parameter]) -> float:
    """Of their gradients, together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()


def state_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """The tensors that the optimizer keeps, by a number."""
    kept = [t for state in optimizer.state.values() for t in state.values()]
    return {str(i): t for i, t in enumerate(kept) if isinstance(t, Tensor)}


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that the optimizer will keep of all it trains: of a step on 64 x 64 zeros of a group's
    type, scaled.

    An optimizer of its own class that a method brings is taken to keep two float32 a number.
    """
    groups = optimizer.param_groups
    counts = [sum(p.numel() for p in group["params"]) for group in groups]
    if not f"{type(optimizer).__module__}.".startswith(OPTIMIZERS):
        return 8 * sum(counts)
    total = 0.0
    for group, count in zip(groups, counts, strict=True):
        first = group["params"][0]
        tiny = torch.nn.Parameter(torch.zeros(64, 64, device=first.device, dtype=first.dtype))
        tiny.grad = torch.zeros_like(tiny)
        probe = copy.copy(optimizer)
        probe.param_groups, probe.state = [{**group, "params": [tiny]}], defaultdict(dict)
        type(optimizer).step(probe)
        kept = [t for t in probe.state[tiny].values() if isinstance(t, Tensor) and t.ndim]
        total += count * sum(t.nbytes for t in kept) / tiny.numel()
    return round(total)
