"""The processes of a run, numbered from 0: which of them this is, and what they tell each other.

Everything here is called by all ranks in the same order. What they exchange are tensors and plain
values in JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
BUCKET = 2**25  # numbers in one message: 128 MiB in float32 beside the tensors themselves


class Ranks:
    """One process alone: what it says comes back as it is."""

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes: to the screen, the run folder, the loggers."""
        return self.rank == 0

    def part(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's contiguous share of `items`; shares differ in length by one at most."""
        n = len(items)
        return items[n * self.rank // self.size : n * (self.rank + 1) // self.size]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Put the sums over all ranks into the tensors, which have the same shapes everywhere."""

    def copy_main_(self, tensors: Iterable[Tensor]) -> None:
        """Put rank 0's values into the tensors, which have the same shapes everywhere."""

    def totals(self, *numbers: float) -> tuple[float, ...]:
        """The sums of numbers over all ranks, in float64."""
        return numbers

    def most(self, number: int) -> int:
        """The largest number that a rank has."""
        return number

    def exchange(self, value: Any) -> list[Any]:
        """The plain value of every rank, by rank."""
        return [value]

    def wait(self) -> None:
        """Return once every rank is here."""


class Group(Ranks):
    """The ranks of torch's default process group."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """One flat all-reduce for every 2^25 numbers, in the given order."""
        for bucket in _buckets(tensors):
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            dist.all_reduce(flat)
            _put(bucket, flat)

    def copy_main_(self, tensors: Iterable[Tensor]) -> None:
        """One flat broadcast for every 2^25 numbers, in the given order."""
        for bucket in _buckets(tensors):
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            dist.broadcast(flat, 0)
            _put(bucket, flat)

    def totals(self, *numbers: float) -> tuple[float, ...]:
        """One all-reduce on the CPU."""
        held = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(held)
        return tuple(held.tolist())

    def most(self, number: int) -> int:
        """One all-reduce on the CPU."""
        held = torch.tensor(number)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        return int(held)

    def exchange(self, value: Any) -> list[Any]:
        """Through JSON, in which every float keeps all its bits."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor(len(text)))
        longest = int(max(lengths))
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(rows, torch.cat([text, text.new_zeros(longest - len(text))]))
        pairs = zip(rows, lengths, strict=True)
        return [json.loads(row[: int(n)].numpy().tobytes()) for row, n in pairs]

    def wait(self) -> None:
        """A barrier on the CPU."""
        self.most(0)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one type and device, as many as fit in a message."""
    held: list[Tensor] = []
    for tensor in tensors:
        alike = not held or (held[0].dtype, held[0].device) == (tensor.dtype, tensor.device)
        if held and (not alike or sum(t.numel() for t in held) + tensor.numel() > BUCKET):
            yield held
            held = []
        held.append(tensor)
    if held:
        yield held


@torch.no_grad()
def _put(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Cut `flat` into the tensors."""
    parts = flat.split([math.prod(t.shape) for t in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))
