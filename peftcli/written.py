"""Configurations as run folders hold them: plain values, by dotted keys, with the defaults of what
their writer did not have, and their hash. No torch, no Hydra.

A run of an earlier version lacks the keys that came later. All were added so that their default
changes nothing, so the default is what the run had.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from peftcli import folders, settings

ADDED_GROUPS = ("launch",)  # later than the first version
PLAIN = re.compile(r"[A-Za-z_/.][\w/.:+-]*")  # text that needs no quotes in an override


def filled(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration with the defaults of the keys it lacks, group by group."""
    return {
        group: {**defaults(group, str(value["_target_"])), **value}
        if isinstance(value, Mapping) and "_target_" in value
        else value
        for group, value in config.items()
    }


@cache
def defaults(group: str, target: str) -> dict[str, Any]:
    """The defaults of a group's keys by what its `_target_` is."""
    if group == "method":
        path = folders.choices("method").get(target.split(".")[-2:][0])
        return yaml.safe_load(folders.text_of(path)) if path else {}
    name = "Optimizer" if group == "optimizer" else target.rpartition(".")[2]
    made: Any = getattr(settings, name, None)
    if not dataclasses.is_dataclass(made):
        return {}
    # what an optimizer passes on to its class is in the file itself
    return {
        f.name: list(f.default) if isinstance(f.default, tuple) else f.default
        for f in dataclasses.fields(made)
        if f.default is not dataclasses.MISSING and f.name not in ("cls", "kwargs")
    }


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """`filled`, with the groups that came later: what a run goes on with."""
    later = {group: {"_target_": f"peftcli.settings.{group.title()}"} for group in ADDED_GROUPS}
    return filled({**later, **config})


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and their values; an empty group is a value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inside = isinstance(value, Mapping) and value
        found |= flat(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return found


def override(key: str, value: Any) -> str:
    """The word of a command line that sets a key."""
    return f"{key}={_typed(value)}"


def _typed(value: Any) -> str:
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) else json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(_typed, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_typed(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def digest(value: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
