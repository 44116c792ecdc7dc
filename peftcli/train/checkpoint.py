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

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from peftcli.core.host import Host
from peftcli.errors import DataError
from peftcli.models.source import sha256
from peftcli.train import streams

FORMAT = 1


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
    limit: int,
    keep: set[int],
) -> Path:
    """Write `folder`/step-NNNNNN and point to it; then remove all but the newest `limit` and the
    steps in `keep`.

    Raises `DataError` where the folder cannot be written; what was there before stays.
    """
    target = folder / f"step-{step:06d}"
    aside = folder / f".{target.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _write_files(aside, parts, snapshot, progress)
        _write_json(
            aside / "manifest.json", {"format": FORMAT, "step": step, "files": _digests(aside)}
        )
        _sync(aside)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        _sync(folder)
        _compare(target, snapshot)
        _point(folder, target.name)
    except OSError as e:
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(
            f"cannot write the checkpoint {target}: {e.strerror or e}. Earlier checkpoints are "
            "intact."
        ) from e
    _rotate(folder, limit, keep | {step})
    return target


def _write_files(
    aside: Path, parts: Parts, snapshot: Snapshot, progress: Mapping[str, Any]
) -> None:
    random = streams.state()
    _save_tensors(aside / "trained.safetensors", snapshot.trained)
    _save_tensors(aside / "optimizer.safetensors", snapshot.optimizer)
    _save_tensors(
        aside / "random.safetensors", {f"torch{i}": t for i, t in enumerate(random["torch"])}
    )
    state = {
        "progress": progress,
        "optimizer": snapshot.rest,
        "scheduler": {k: v for k, v in parts.scheduler.state_dict().items() if _is_plain(v)},
        "random": {"numpy": random["numpy"], "python": random["python"]},
    }
    _write_json(aside / "state.json", state)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, path)
    _sync(path)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
    _sync(path)


def _optimizer_state(parts: Parts) -> Iterator[tuple[str, str, Any]]:
    """(parameter, key, value) of everything that the optimizer keeps."""
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
    """The groups' options, and the plain values of the state."""
    state = {f"{n}::{k}": v for n, k, v in _optimizer_state(parts) if not isinstance(v, Tensor)}
    groups = [
        {k: v for k, v in g.items() if k != "params" and _is_plain(v)}
        for g in parts.optimizer.param_groups
    ]
    return {"state": state, "groups": groups}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(v) for v in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | float | str)


def _digests(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.iterdir() if p.name != "manifest.json")
    return {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _point(folder: Path, name: str) -> None:
    aside = folder / ".latest"
    aside.write_text(name + "\n", encoding="utf-8")
    _sync(aside)
    aside.replace(folder / "latest")
    _sync(folder)


def _compare(target: Path, snapshot: Snapshot) -> None:
    """Read back what was written and compare it with what was to be."""
    live = snapshot.trained
    with safe_open(target / "trained.safetensors", "pt") as f:
        assert set(f.keys()) == set(live), "a checkpoint lacks tensors"
        for name, tensor in live.items():
            read = f.get_tensor(name)
            if not torch.equal(read, tensor) and not torch.isnan(read).any():
                raise DataError(
                    f"{target}: {name} reads back differently from what was written. Is the disk "
                    "sound?"
                )


def _rotate(folder: Path, limit: int, keep: set[int]) -> None:
    for path in folder.glob(".step-*"):  # left by a killed process
        shutil.rmtree(path, ignore_errors=True)
    for path in _by_step(folder)[limit:]:
        if _step(path) not in keep:
            shutil.rmtree(path, ignore_errors=True)


# -- reading ---------------------------------------------------------------------------------------
def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _by_step(folder: Path) -> list[Path]:
    """Complete-looking checkpoints, newest first."""
    found = [p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_step, reverse=True)


def problem(path: Path) -> str | None:
    """What is wrong with the checkpoint, or None: every file is there with the size and hash of the
    manifest.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"it has format {manifest['format']}, this version reads {FORMAT}"
        for name, known in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != known["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, the manifest says {known['bytes']}"
            if sha256(file) != known["sha256"]:
                return f"{name} is damaged: its hash is not the manifest's"
    except FileNotFoundError:
        return "it has no manifest.json"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        return f"its manifest cannot be read ({e})"
    return None


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest verified checkpoint, and a line for each newer one that was passed over.

    Raises `DataError` where there are checkpoints but none can be trusted.
    """
    skipped: list[str] = []
    for path in _by_step(folder):
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
    parts.scheduler.load_state_dict(state["scheduler"])
    streams.restore({"torch": [random[f"torch{i}"] for i in range(len(random))], **state["random"]})
    return state["progress"]


def _load_optimizer(parts: Parts, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    named, shares = parts.host.stepped(), parts.host.shares  # what rests may have a state too
    for entry, value in [*tensors.items(), *rest["state"].items()]:
        name, _, key = entry.rpartition("::")
        if isinstance(value, Tensor) and value.ndim:
            value = shares[name].part(value) if name in shares else value.to(named[name].device)
        parts.optimizer.state[named[name]][key] = value
    for group, saved in zip(parts.optimizer.param_groups, rest["groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
