"""FSDP2: each block's weights are cut up over the ranks, and gathered when the block's forward or
backward pass is entered. Of what trains, matrices of the base are cut up with their optimizer
state; vectors and adapters stay whole on every rank, in float32.
"""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.core.shares import CutShare, is_matrix
from peftcli.settings import Offload


def shard(host: Host, device: torch.device, offload: Offload = "none") -> None:
    """Cut up the weights of every block, then of what is outside of them. `offload`: rows that
    train are stepped in the memory of the CPU (`optimizer`), where all rows lie that are not needed
    at the moment (`parameters`).
    """
    whole = _whole(host)
    for parameter in whole:  # FSDP moves only what it cuts up
        parameter.data = parameter.data.to(device)
    # T5's blocks hand their position bias on as a view, which nothing writes into
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    pinned = device.type == "cuda"
    policy = CPUOffloadPolicy(pinned) if offload == "parameters" else OffloadPolicy()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    cut = [n for n in host.selected if host.model.get_parameter(n) not in whole]
    for path in [*_outermost(host.layout.blocks), ""]:
        module = host.model.get_submodule(path)
        fully_shard(module, mesh=mesh, ignored_params=whole, offload_policy=policy)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # losses are divided by the totals of all ranks
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no sum of products
    for name in cut:
        parameter = host.model.get_parameter(name)
        where = parameter.device if offload == "none" else torch.device("cpu")
        host.shares[name] = CutShare(parameter, host.ranks, where)


def _whole(host: Host) -> set[nn.Parameter]:
    """What is not cut up: adapters, and vectors of the base that train or may train."""
    named = host.model.named_parameters(remove_duplicate=False)
    kept = {n for n in host.selected if not is_matrix(host.model.get_parameter(n))}
    cut = {host.model.get_parameter(n) for n in host.selected if n not in kept}
    return {p for n, p in named if is_own(n) or n in kept or (p.requires_grad and p not in cut)}


def _outermost(paths: tuple[str, ...] | list[str]) -> list[str]:
    """The blocks that lie in no other block."""
    return [p for p in paths if not any(p.startswith(f"{other}.") for other in paths)]
