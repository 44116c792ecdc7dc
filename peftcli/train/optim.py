"""The optimizer and the learning-rate schedule of a run, from torch's and transformers' own."""

from __future__ import annotations

import importlib
import inspect
import math

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from peftcli.core.host import Host
from peftcli.core.method import Method
from peftcli.errors import ConfigError
from peftcli.settings import Optimizer as OptimizerSettings
from peftcli.settings import Scheduler


def make_optimizer(settings: OptimizerSettings, method: Method, host: Host) -> Optimizer:
    """The class that `settings.cls` names, over the method's parameter groups; fused where torch
    has that.
    """
    module, _, name = settings.cls.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
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


def make_scheduler(settings: Scheduler, optimizer: Optimizer, total: int) -> LRScheduler:
    """The named schedule over `total` optimizer steps."""
    from transformers import get_scheduler  # imports peft and bitsandbytes where they are: slow

    warmup = settings.warmup_steps
    if warmup is None:
        warmup = math.ceil(settings.warmup_ratio * total)
    if warmup > total:
        raise ConfigError(
            f"scheduler.warmup_steps={warmup} is more than the run's {total} optimizer steps."
        )
    try:
        return get_scheduler(
            settings.name,
            optimizer,
            num_warmup_steps=warmup,
            num_training_steps=total,
            scheduler_specific_kwargs=dict(settings.kwargs),
        )
    except (TypeError, ValueError) as e:
        raise ConfigError(
            f"scheduler.kwargs={dict(settings.kwargs)} do not fit {settings.name}: {e}"
        ) from None


def clip(parameters: list[torch.nn.Parameter], max_norm: float | None) -> float:
    """Scale the gradients down to `max_norm` and return the norm (L2) that they had."""
    bound = math.inf if max_norm is None else max_norm
    return torch.nn.utils.clip_grad_norm_(parameters, bound).item()
