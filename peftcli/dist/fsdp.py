"""FSDP2: each block's frozen weights are cut up over the ranks, and gathered when the block's
forward or backward pass is entered. What trains stays whole and in float32 on every rank.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.errors import ConfigError


def shard(host: Host, device: torch.device) -> None:
    """Cut up the frozen weights of every block, then of what is outside of them."""
    whole = _whole(host)
    for parameter in whole:  # FSDP moves only what it cuts up
        parameter.data = parameter.data.to(device)
    # T5's blocks hand their position bias on as a view, which nothing writes into
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for path in _outermost(host.layout.blocks):
        fully_shard(host.model.get_submodule(path), mesh=mesh, ignored_params=whole)
    fully_shard(host.model, mesh=mesh, ignored_params=whole)


def refuse(host: Host) -> None:
    """Raises `ConfigError` where nothing is frozen."""
    if not set(host.model.parameters()) - _whole(host):
        methods = ", ".join(type(method).__name__ for method in host.adapters.values())
        raise ConfigError(
            f"strategy=fsdp: cuts up frozen weights, and {methods} leaves none. Use strategy=ddp."
        )


def _whole(host: Host) -> set[nn.Parameter]:
    """What is not cut up: adapters, and weights of the base that train or may train."""
    named = host.model.named_parameters(remove_duplicate=False)
    kept = set(host.selected)
    return {p for n, p in named if is_own(n) or n in kept or p.requires_grad}


def _outermost(paths: tuple[str, ...] | list[str]) -> list[str]:
    """The blocks that lie in no other block."""
    return [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]

