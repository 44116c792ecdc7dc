"""Named streams of randomness, all derived from one seed: the same seed gives the same run, and
drawing more from one stream never shifts another.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def derive(seed: int, name: str) -> int:
    """The seed of the stream `name` ('init', 'order', 'dropout', ...): 63 bits of a hash."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for the stream."""
    return torch.Generator().manual_seed(derive(seed, name))


@contextmanager
def stream(seed: int, name: str) -> Iterator[None]:
    """Draw from the stream `name` inside the block; the streams outside stay where they were."""
    held = state()
    seed_all(seed, name)
    try:
        yield
    finally:
        restore(held)


def seed_all(seed: int, name: str) -> None:
    """Start the global generators (torch, numpy, random) at the stream `name`."""
    value = derive(seed, name)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)


def state() -> dict[str, Any]:
    """The global generators' states: tensors for torch, plain lists for the others."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": [
            torch.get_rng_state(),
            *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []),
        ],
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
        "python": _as_list(random.getstate()),
    }


def restore(held: dict[str, Any]) -> None:
    """Put the global generators back to `held`, a result of `state`."""
    cpu, *cuda = held["torch"]
    torch.set_rng_state(cpu)
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda[: torch.cuda.device_count()])
    kind, keys, *rest = held["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    version, words, gauss = held["python"]
    random.setstate((version, tuple(words), gauss))


def _as_list(python_state: tuple[Any, ...]) -> list[Any]:
    version, words, gauss = python_state
    return [version, list(words), gauss]


def order(
    n: int, seed: int, epoch: int, lengths: np.ndarray | None = None, batch: int = 1
) -> Tensor:
    """The examples' order (n,) in an epoch. With `lengths`, batches of similar length: sorted
    within runs of fifty batches.
    """
    draw = generator(seed, f"order/{epoch}")
    shuffled = torch.randperm(n, generator=draw)
    if lengths is None:
        return shuffled
    runs = shuffled.split(50 * batch)
    by_length = torch.from_numpy(np.asarray(lengths))
    grouped = torch.cat([run[by_length[run].argsort(descending=True, stable=True)] for run in runs])
    batches = grouped.split(batch)
    full = [b for b in batches if len(b) == batch]
    mixed = [full[i] for i in torch.randperm(len(full), generator=draw).tolist()]
    return torch.cat([*mixed, *(b for b in batches if len(b) < batch)])
