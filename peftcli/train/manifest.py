"""What a checkpoint's manifest says of its files, when they are written and when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcli.disk import sha256, sync
from peftcli.errors import DataError

FILES = ("trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json")
READ_AT_ONCE = 2**22  # bytes


def verified(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Have the file on the disk, and read it once: the manifest's entry. Raises `DataError` where
    the tensors read back differently from what was to be written.
    """
    sync(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        digest.update(length + header)
        places = {k: v["data_offsets"] for k, v in json.loads(header).items() if k in tensors}
        assert len(places) == len(tensors), "a checkpoint lacks tensors"
        for name in sorted(places, key=lambda name: places[name]):
            live = tensors[name].reshape(-1).view(torch.uint8)
            for part in live.split(READ_AT_ONCE):
                content = file.read(len(part))
                digest.update(content)
                if content != part.numpy().tobytes():
                    raise DataError(
                        f"{path}: {name} reads back differently from what was written. Is the disk "
                        "sound?"
                    )
        assert not file.read(1), "a checkpoint holds more than was written"
    return entry(path, digest.hexdigest())


def entry(path: Path, digest: str | None = None) -> dict[str, Any]:
    """Of a file, whose hash is read off it where it is not known."""
    return {"bytes": path.stat().st_size, "sha256": digest or sha256(path)}


def misfit(path: Path, files: Mapping[str, Any]) -> str | None:
    """The first file that is not as the manifest describes it."""
    for name in FILES:
        file, known = path / name, files[name]
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != known["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {known['bytes']}"
        if sha256(file) != known["sha256"]:
            return f"{name} is damaged: its hash is not the manifest's"
    return None
