"""What every rank holds whole: equal at the start, and equal after every step, because all ranks
take the same step by the same summed gradients.
"""

from __future__ import annotations

import torch

from peftcli.core.host import Host
from peftcli.dist.ranks import Ranks
from peftcli.errors import ConfigError


def start_alike(host: Host, ranks: Ranks) -> None:
    """Give every rank the state of rank 0. Raises `ConfigError` where the method has chosen
    tensors of other shapes there, as data-driven choices may on other hardware.
    """
    state = host.state()
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    for rank, theirs in enumerate(ranks.exchange(shapes)):
        if theirs != shapes:
            odd = sorted(n for n in {*shapes, *theirs} if shapes.get(n) != theirs.get(n))
            raise ConfigError(
                f"ranks {ranks.rank} and {rank} start from different adapters ({odd[0]}: "
                f"{shapes.get(odd[0])} and {theirs.get(odd[0])}). Are the nodes' devices, model "
                "files and versions the same?"
            )
    ranks.copy_main_(state.values())


@torch.no_grad()
def sum_gradients(host: Host, ranks: Ranks, *numbers: float) -> tuple[float, ...]:
    """Sum the gradients of everything that trains over the ranks, in the order of the names, in
    float32, but of what sums itself; with them go `numbers`, whose sums are returned. The loss is
    divided by the totals of all ranks already, so a sum is the mean.

    A gradient that no rank has stays away; one that only some have is 0 on the others.
    """
    if ranks.size == 1:
        return numbers
    shares = host.shares
    trained = [p for n, p in host.trained().items() if n not in shares or not shares[n].reduces]
    device = trained[0].device if trained else torch.device("cpu")
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    have = [float(p.grad is not None) for p in trained]
    told = torch.tensor([*numbers, *have], device=device)
    ranks.sum_([*grads, told])  # in one message, where few numbers train
    summed = told.tolist()
    for p, grad, n in zip(trained, grads, summed[len(numbers) :], strict=True):
        if n and p.grad is None:
            p.grad = grad
    return tuple(summed[: len(numbers)])
