"""What a key was before there was such a key: its default.

A run of an earlier version lacks the keys that came later. All were added so that their default
changes nothing, so the default is what the run had.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from peftcli import folders, settings
from peftcli.folders import text_of


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
        return yaml.safe_load(text_of(path)) if path else {}
    made = settings.Optimizer if group == "optimizer" else getattr(settings, group.title(), None)
    if made is None:
        return {}
    # what an optimizer passes on to its class is in the file itself
    return {
        f.name: f.default
        for f in dataclasses.fields(made)
        if f.default is not dataclasses.MISSING and f.name not in ("cls", "kwargs")
    }
