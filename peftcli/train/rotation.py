"""Which checkpoints stay: the newest few within a budget of bytes, and those that are protected."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Keep:
    """The `limit` newest, as far as all together fit in `num_bytes`; `steps`, such as the best,
    stay in any case.
    """

    limit: int
    num_bytes: int | None = None
    steps: frozenset[int] = field(default_factory=frozenset)


def step_of(path: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(path.name.removeprefix("step-"))


def by_step(folder: Path) -> list[Path]:
    """Folders that are named as checkpoints are, the highest step first, whatever their times."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def bytes_of(path: Path) -> int:
    """Bytes of the files in a folder and below."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def rotate(folder: Path, newest: int, keep: Keep) -> None:
    """Remove what `keep` does not hold, once the checkpoint of step `newest` is safe.

    Higher steps go too: the run that wrote `newest` passed over them, since they are damaged.
    """
    for path in folder.glob(".step-*"):  # left by a killed process
        shutil.rmtree(path, ignore_errors=True)
    protected, held = keep.steps | {newest}, 0
    sizes = {path: bytes_of(path) for path in by_step(folder)}
    taken = sum(size for path, size in sizes.items() if step_of(path) in protected)
    for path, size in sizes.items():
        step, held = step_of(path), held + 1
        if step in protected:
            continue
        fits = held <= keep.limit and (keep.num_bytes is None or taken + size <= keep.num_bytes)
        if step > newest or not fits:
            shutil.rmtree(path, ignore_errors=True)
            held -= 1
        else:
            taken += size
