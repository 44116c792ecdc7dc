"""ZeRO: what trains is divided over the ranks, and in stage 3 the whole model is.

    stage 1   every rank steps its rows of what trains, and keeps their optimizer state alone
    stage 2   gradients of the base's own matrices are kept for these rows alone, too
    stage 3   DeepSpeed partitions the base's weights, and gathers them module by module

DeepSpeed's engine would take the step itself: it wants one type for all weights, clips and sums
inside, fixes what trains when it starts, and keeps its optimizer's state in flat pieces whose
layout goes by the number of ranks. Here the step is the loop's own (`core.shares`), so that methods
see whole gradients, LISA may change what trains, no number that is not finite reaches a weight, and
checkpoints are those of one process. Of DeepSpeed we take what it does alone: partitioned
parameters, fetched ahead and kept in the memory of the CPU where asked.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from typing import Any, cast

import torch
from torch import nn

from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.core.shares import ReducedShare, Share, is_matrix
from peftcli.dist.ranks import Ranks
from peftcli.errors import ConfigError
from peftcli.settings import DeepSpeed


class _Partitioned(Share):
    """Of a parameter that DeepSpeed partitions: its own pieces are flat and may be of another type,
    so the rows that are stepped lie beside them.
    """

    copies, is_whole = True, False

    @torch.no_grad()
    def settle(self) -> None:
        """Let DeepSpeed partition the new values."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        parameter: Any = self.parameter
        parameter.grad = None
        parameter.data = self.whole().to(parameter.dtype)
        parameter.ds_status = ZeroParamStatus.AVAILABLE
        parameter.partition(param_list=[parameter], has_been_updated=True)


class PartitionedMatrix(_Partitioned, ReducedShare):
    """Rows of a matrix."""


class PartitionedVector(_Partitioned):
    """A vector, stepped whole on every rank."""

    def __init__(self, parameter: nn.Parameter, device: torch.device) -> None:
        super().__init__(parameter, Ranks(), device)


def refuse_missing() -> None:
    """Raises `ConfigError` where DeepSpeed is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "strategy.zero_stage=3: DeepSpeed is not installed: pip install 'peftcli[deepspeed]'; "
            "or take strategy=fsdp, which divides as much."
        )


def divide(host: Host, settings: DeepSpeed, device: torch.device) -> None:
    """Give every rank its share of what trains."""
    where, selected = _home(settings, device), set(host.selected)
    kind = {1: Share, 2: ReducedShare, 3: PartitionedMatrix}[settings.zero_stage]
    for name, parameter in host.model.named_parameters():
        if is_own(name) and parameter.requires_grad and is_matrix(parameter):
            host.shares[name] = Share(parameter, host.ranks, device)  # methods write into it, too
        elif name in selected and is_matrix(parameter):
            host.shares[name] = kind(parameter, host.ranks, where)
        elif name in selected and settings.zero_stage == 3:
            host.shares[name] = PartitionedVector(parameter, where)


def _home(settings: DeepSpeed, device: torch.device) -> torch.device:
    """Where rows and optimizer state lie."""
    return device if settings.offload == "none" else torch.device("cpu")


def place_adapters(host: Host, device: torch.device) -> None:
    """Adapters and buffers onto the device, where DeepSpeed does not take them."""
    for name, parameter in host.model.named_parameters():
        if is_own(name):
            parameter.data = parameter.data.to(device)
    for buffer in host.model.buffers():
        buffer.data = buffer.data.to(device)


def partition(host: Host, config: dict[str, Any], device: torch.device) -> Any:
    """Stage 3: hand the base's weights to DeepSpeed, which `config` tells how; what sits on a site
    reads them inside the site's forward pass. Returns DeepSpeed's keeper of them.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils.timer import NoopTimer

    # none of its compiled operations is needed; it would try them all, and build one for minutes
    cast(Any, deepspeed.ops).__compatible_ops__ = {}
    # DeepSpeed calls two collectives by the names that they had before torch 2.13
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    zero: Any = DeepSpeedConfig(config).zero_config
    with host.bare() as model:
        keeper = DeepSpeedZeRoOffload(
            model,
            timers=NoopTimer(),
            ds_config=config,
            overlap_comm=zero.overlap_comm,
            prefetch_bucket_size=zero.prefetch_bucket_size,
            max_reuse_distance=zero.max_reuse_distance,
            max_live_parameters=zero.max_live_parameters,
            param_persistence_threshold=zero.param_persistence_threshold,
            model_persistence_threshold=zero.model_persistence_threshold,
            offload_param_config=zero.offload_param,
        )
    host.model.register_forward_pre_hook(lambda model, _: _reads_outside(model, True))
    host.model.register_forward_hook(lambda model, *_: _reads_outside(model, False))
    return keeper


def _reads_outside(model: nn.Module, allowed: bool) -> None:
    """Whether weights may be read by other modules than their own, and are gathered then."""
    for module in model.modules():
        if hasattr(module._parameters, "_in_forward"):
            cast(Any, module._parameters)._in_forward = allowed
