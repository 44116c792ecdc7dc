"""The processes of a run, numbered from 0: which of them this is, and what they tell each other.

Everything here is called by all ranks in the same order. What they exchange are tensors and plain
values in JSON; nothing is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_new: Any = dist  # two collectives were renamed in torch 2.13
all_gather = getattr(_new, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(_new, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
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

    def rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor (D, ...): of ceil(D / ranks) each, the last may have fewer."""
        each = -(-whole.shape[0] // self.size)
        return whole[each * self.rank : each * (self.rank + 1)]

    def join_(self, wholes: Iterable[Tensor], rows: Iterable[Tensor]) -> None:
        """Put the `rows` of all ranks together in tensors (D, ...)."""
        for whole, own in zip(wholes, rows, strict=True):
            whole.copy_(own)

    def sum_rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of the sum of a tensor over all ranks."""
        return whole

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
    """The ranks of torch's default process group. `alive` is called once in every step at least."""

    def __init__(self, device: torch.device, alive: Callable[[], None] = lambda: None) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device
        self.alive = alive

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """One flat all-reduce for every 2^25 numbers, in the given order."""
        self.alive()
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

    @torch.no_grad()
    def join_(self, wholes: Iterable[Tensor], rows: Iterable[Tensor]) -> None:
        """One flat all-gather for every 2^25 numbers of a rank, in the given order."""
        wholes = list(wholes)
        pairs = zip(wholes, rows, strict=True)
        padded = (_padded(own, -(-whole.shape[0] // self.size)) for whole, own in pairs)
        places = iter(wholes)
        for bucket in _buckets(padded):
            flat = torch.cat([t.detach().reshape(-1) for t in bucket])
            joined = flat.new_empty(self.size * len(flat))
            all_gather(joined, flat)
            parts = joined.view(self.size, -1).split([t.numel() for t in bucket], dim=1)
            for part, whole in zip(parts, places, strict=False):  # the next bucket's come later
                whole.copy_(part.reshape(-1, *whole.shape[1:])[: whole.shape[0]])

    def sum_rows(self, whole: Tensor) -> Tensor:
        """One reduce-scatter."""
        each = -(-whole.shape[0] // self.size)
        summed = whole.new_empty(each, *whole.shape[1:])
        reduce_scatter(summed, _padded(whole, each * self.size))
        return summed[: len(self.rows(whole))]

    def totals(self, *numbers: float) -> tuple[float, ...]:
        """One all-reduce on the CPU."""
        self.alive()
        held = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(held)
        return tuple(held.tolist())

    def most(self, number: int) -> int:
        """One all-reduce on the CPU."""
        self.alive()
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


def _padded(rows: Tensor, D: int) -> Tensor:
    """(D, ...) with zeros below."""
    lacking = D - rows.shape[0]
    if not lacking:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(lacking, *rows.shape[1:])])


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
