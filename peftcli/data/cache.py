"""Prepared data on disk: `<key>.safetensors` with flat arrays, mapped into memory, and `<key>.json`
beside it.

The key is a hash of everything that the arrays depend on; the JSON file holds these ingredients,
what the screen shows, and size and hash of the arrays. Both files are written aside and renamed,
the JSON file last, so a reader finds a whole entry or none. A damaged entry counts as none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from peftcli import written
from peftcli.data.examples import Arrays
from peftcli.disk import sha256, sync

DTYPES = {"I64": np.int64, "I32": np.int32, "U8": np.uint8, "BOOL": np.bool_, "F64": np.float64}
CHECKED = (
    2**28
)  # bytes; larger files are checked by size alone, since hashing takes a second a gigabyte


class Entry(NamedTuple):
    """What was found: arrays and the JSON file's content."""

    arrays: Arrays
    info: dict[str, Any]


def key_of(ingredients: Mapping[str, Any]) -> str:
    """The name of what these ingredients give."""
    return written.digest(ingredients)[:32]


def load(folder: Path, key: str, ingredients: Mapping[str, Any]) -> Entry | str | None:
    """The entry, None where there is none, or what is wrong with it."""
    described, flat = folder / f"{key}.json", folder / f"{key}.safetensors"
    if not described.is_file() or not flat.is_file():
        return None
    try:
        info = json.loads(described.read_bytes())
        given = info["ingredients"], info["bytes"], info["hash"]
    except (ValueError, KeyError, TypeError) as error:
        return f"{described.name} is damaged ({type(error).__name__})"
    if given[0] != json.loads(json.dumps(ingredients)):
        return f"{described.name} was made from something else"
    if flat.stat().st_size != given[1]:
        return f"{flat.name} has {flat.stat().st_size} bytes instead of {given[1]}"
    if given[1] <= CHECKED and sha256(flat) != given[2]:
        return f"{flat.name} has another content than when it was written"
    return Entry(_mapped(flat), info)


def save(
    folder: Path, key: str, ingredients: Mapping[str, Any], arrays: Arrays, info: Mapping[str, Any]
) -> None:
    """Write an entry, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{key}.{os.getpid()}"
    save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, aside)
    described = {
        "ingredients": ingredients,
        "bytes": aside.stat().st_size,
        "hash": sha256(aside),
        **info,
    }
    sync(aside)
    aside.replace(folder / f"{key}.safetensors")
    aside.write_text(json.dumps(described, indent=1))
    sync(aside)
    aside.replace(folder / f"{key}.json")


def _mapped(path: Path) -> Arrays:
    """Arrays of a safetensors file as views of the mapped file (the library's reader copies)."""
    data = np.memmap(path, np.uint8, mode="r")
    size = int.from_bytes(data[:8].tobytes(), "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + size].tobytes())
    arrays: Arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = (8 + size + at for at in entry["data_offsets"])
            arrays[name] = (
                np.asarray(data[first:last]).view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
            )
    return arrays
