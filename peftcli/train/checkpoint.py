"""Checkpoints that survive anything: written aside, fsynced, described by a manifest, renamed, then
pointed to.

    checkpoints/step-000200/  trained.safetensors  optimizer.safetensors  random.safetensors
                              state.json  manifest.json
    checkpoints/latest        the newest one's name

`trained` is `Host.state()`, `optimizer` the state of each trained parameter under `name::key`,
`state` everything else. Nothing is pickled. A checkpoint is trusted only when its manifest fits its
files, byte for byte.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from peftcli.core.host import Host
from peftcli.disk import sync
from peftcli.errors import DataError, NonFinite
from peftcli.train import manifest, streams
from peftcli.train.finite import not_finite
from peftcli.train.rotation import Keep, by_step, rotate

FORMAT = 1
PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)  # of disks that a network lies before
PAUSES = (1.0, 10.0)  # seconds before a save is tried again after such an error


@dataclass(frozen=True)
class Parts:
    """The live objects that a checkpoint is taken of and restored into."""

    host: Host
    optimizer: Optimizer
    scheduler: LRScheduler


@dataclass(frozen=True)
class Snapshot:
    """What is written of them: tensors in the memory of the CPU, and plain values."""

    trained: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rest: dict[str, Any]


# -- writing ---------------------------------------------------------------------------------------
def take(parts: Parts) -> Snapshot:
    """The state of now, whole, on rank 0. All ranks take it together: what they divide is gathered
    one tensor at a time, and the others keep none of it.
    """
    keeps = parts.host.ranks.is_main
    trained = {n: t.detach().cpu() for n, t in parts.host.named_state() if keeps}
    tensors = {n: t.detach().cpu() for n, t in _optimizer_tensors(parts) if keeps}
    return Snapshot(trained, tensors, _optimizer_rest(parts))


def save(
    folder: Path,
    step: int,
    parts: Parts,
    snapshot: Snapshot,
    progress: Mapping[str, Any],
    keep: Keep,
) -> Path:
    """Write `folder`/step-NNNNNN and point to it; then remove what `keep` does not hold. A sound
    checkpoint of this step is the same already, and stays.

    Raises `DataError` where the folder cannot be written, though it was tried again, `NonFinite`
    for numbers that are not finite; what was there before stays.
    """
    target = folder / f"step-{step:06d}"
    if problem(target) is None:
        return target
    try:
        for pause in (*PAUSES, None):
            try:
                _write(target, parts, snapshot, progress, step)
                break
            except (OSError, SafetensorError) as e:
                if pause is None or not _may_pass(e):
                    raise
                time.sleep(pause)
    except (OSError, SafetensorError) as e:
        raise DataError(
            f"cannot write the checkpoint {target}: {getattr(e, 'strerror', None) or e}. Earlier "
            "checkpoints are intact; `peft-train RUN_FOLDER` goes on from the newest."
        ) from e
    rotate(folder, step, keep)
    return target


def _may_pass(e: Exception) -> bool:
    """Whether it is an error of a disk elsewhere that may be gone at the next try."""
    return any(getattr(e, "errno", None) == n or f"(os error {n})" in str(e) for n in PASSING)


def _write(
    target: Path, parts: Parts, snapshot: Snapshot, progress: Mapping[str, Any], step: int
) -> None:
    """The checkpoint `target`, beside its place, then there, then pointed to."""
    folder, aside = target.parent, target.with_name(f".{target.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        files = _write_files(aside, parts, snapshot, progress)
        _write_json(aside / "manifest.json", {"format": FORMAT, "step": step, "files": files})
        sync(aside)
        if target.exists():  # a damaged one
            shutil.rmtree(target)
        aside.rename(target)
        sync(folder)
        _point(folder, target.name)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_files(
    aside: Path, parts: Parts, snapshot: Snapshot, progress: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Write all files and verify them, the largest first, which takes longest, while the others are
    written; their sizes and hashes.
    """
    random = streams.state()
    tensors = {
        "optimizer.safetensors": snapshot.optimizer,
        "trained.safetensors": snapshot.trained,
        "random.safetensors": {f"torch{i}": t for i, t in enumerate(random["torch"])},
    }
    state = {
        "progress": progress,
        "optimizer": snapshot.rest,
        "scheduler": {k: v for k, v in parts.scheduler.state_dict().items() if _is_plain(v)},
        "random": {"numpy": random["numpy"], "python": random["python"]},
    }
    with ThreadPoolExecutor(2) as beside:
        described = {}
        for name, values in tensors.items():
            _save_tensors(aside / name, values)
            described[name] = beside.submit(manifest.verified, aside / name, values)
        _write_json(aside / "state.json", state)
        found = {name: entry.result() for name, entry in described.items()}
    return found | {"state.json": manifest.entry(aside / "state.json")}


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    if broken := not_finite(tensors):
        raise NonFinite(
            f"{len(broken)} tensors of {path.stem} are not finite ({', '.join(broken[:2])}); no "
            "checkpoint was written of them. Earlier ones are intact."
        )
    save_file(_apart(tensors), path)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, none of which shares memory with another; copied where they must."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        memory = here.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != here.nbytes:
            here = here.clone()
        seen.add(memory.data_ptr())
        found[name] = here
    return found


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    sync(path)


def _optimizer_state(parts: Parts) -> Iterator[tuple[str, str, Any]]:
    """(parameter, key, value) of everything that the optimizer keeps. The groups' options are those
    of the configuration.
    """
    names = {p: n for n, p in parts.host.stepped().items()}
    for group in parts.optimizer.param_groups:
        for p in group["params"]:
            for key, value in parts.optimizer.state.get(p, {}).items():
                yield names[p], key, value


def _optimizer_tensors(parts: Parts) -> Iterator[tuple[str, Tensor]]:
    """'parameter::key' and tensor, one by one; rows of what ranks divide become whole."""
    for name, key, value in _optimizer_state(parts):
        if isinstance(value, Tensor):
            share = parts.host.shares.get(name) if value.ndim else None
            yield f"{name}::{key}", share.whole(value) if share else value


def _optimizer_rest(parts: Parts) -> dict[str, Any]:
    """The plain values of the state."""
    found = _optimizer_state(parts)
    return {"state": {f"{n}::{k}": v for n, k, v in found if not isinstance(v, Tensor)}}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _point(folder: Path, name: str) -> None:
    aside = folder / ".latest"
    aside.write_text(name + "\n", encoding="utf-8")
    sync(aside)
    aside.replace(folder / "latest")
    sync(folder)


# -- reading ---------------------------------------------------------------------------------------
def problem(path: Path) -> str | None:
    """What is wrong with the checkpoint, or None: every file is there with the size and hash of the
    manifest. Raises `DataError` where a newer version has written it, which is not for this one to
    judge.
    """
    try:
        told = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if (version := int(told["format"])) <= FORMAT:
            return manifest.misfit(path, told["files"])
    except FileNotFoundError:
        return "it has no manifest.json"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        return f"its manifest cannot be read ({type(e).__name__}: {e})"
    raise DataError(
        f"{path} was written by a newer peftcli (format {version}; this one reads up to {FORMAT}). "
        "Update peftcli to go on from it, or choose another run_dir."
    )


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest verified checkpoint, and a line for each newer one that was passed over.

    Raises `DataError` where there are checkpoints but none can be trusted.
    """
    skipped: list[str] = []
    for path in by_step(folder):
        trouble = problem(path)
        if trouble is None:
            return path, skipped
        skipped.append(f"{path.name}: {trouble}")
    if skipped:
        raise DataError(
            f"no checkpoint in {folder} can be trusted: {'; '.join(skipped)}. Start anew with "
            "resume=never (what is there is kept aside), or choose another run_dir."
        )
    return None, skipped


def load(path: Path, parts: Parts) -> dict[str, Any]:
    """Restore everything that `save` wrote, and return the progress. The caller has verified the
    checkpoint.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        parts.host.load_state(load_file(path / "trained.safetensors"))
        _load_optimizer(parts, load_file(path / "optimizer.safetensors"), state["optimizer"])
        random = load_file(path / "random.safetensors")
    except (OSError, SafetensorError, KeyError, ValueError) as e:
        if isinstance(e, DataError):
            raise DataError(f"{path}: {e}") from None
        raise DataError(f"the checkpoint {path} cannot be read: {e}") from e
    _go_on(parts.scheduler, state["scheduler"])
    streams.restore({"torch": [random[f"torch{i}"] for i in range(len(random))], **state["random"]})
    return state["progress"]


def _load_optimizer(parts: Parts, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    named, shares = parts.host.stepped(), parts.host.shares  # what rests may have a state too
    for entry, value in [*tensors.items(), *rest["state"].items()]:
        name, _, key = entry.rpartition("::")
        if isinstance(value, Tensor) and value.ndim:
            value = shares[name].part(value) if name in shares else value.to(named[name].device)
        parts.optimizer.state[named[name]][key] = value


def _go_on(scheduler: LRScheduler, saved: Mapping[str, Any]) -> None:
    """The schedule at the saved position, at the rates that the configuration has now: who goes on
    from a checkpoint with new values means them.
    """
    if saved["last_epoch"]:
        scheduler.last_epoch = saved["last_epoch"] - 1
        scheduler._step_count = saved["_step_count"] + 1  # at the first step torch would warn
        scheduler.step()
    scheduler._step_count = saved["_step_count"]
