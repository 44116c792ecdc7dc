"""The cards of `configs/`: each file with its header, its keys and their comments.

The verbs `methods` and `explain`, and every error message, read from here. No torch, no Hydra.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml

from peftcli import settings
from peftcli.errors import ConfigError, did_you_mean
from peftcli.folders import PACKAGE, built_in, choices, config_folders, targets, text_of
from peftcli.traits import family
from peftcli.words import allowed_values

ROOT = "config"  # the file of the keys that are in no group
_FIELDS = dataclasses.fields(settings.Command)
GROUPS = tuple(f.name for f in _FIELDS if f.type in ("Any", f.name.title()))
TOP_KEYS = tuple(f.name for f in _FIELDS if f.name not in GROUPS)
OF_SWEEPS = tuple(f.name for f in _FIELDS if f not in dataclasses.fields(settings.Run))
RUN_GROUPS = tuple(name for name in GROUPS if name not in OF_SWEEPS)
RUN_KEYS = tuple(name for name in TOP_KEYS if name not in OF_SWEEPS)
_LINE = re.compile(
    r"""(?P<key>\w+):\s*
        (?P<value>"(?:[^"\\]|\\.)*" | '[^']*' | \[[^\]]*\] | \{(?:[^{}]|\{[^{}]*\})*\} | [^#]*?)\s*
        (?:\#\s?(?P<comment>.*))?$""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Key:
    """One line of a file: what it holds, what it may hold, and what that means."""

    name: str
    default: str  # as it is written
    takes: str  # the values allowed, in words; empty where only the library's class knows
    meaning: str


@dataclass(frozen=True)
class Card:
    """One file of a group."""

    group: str
    choice: str
    path: Path
    command: str
    summary: str
    target: str
    keys: tuple[Key, ...]


def cards(group: str, config_dirs: Iterable[Path] = ()) -> list[Card]:
    """The cards of a group, in the order of their names."""
    return [
        read_card(group, choice, path)
        for choice, path in sorted(choices(group, config_dirs).items())
    ]


def root_card(config_dirs: Iterable[Path] = ()) -> Card:
    """The card of `config.yaml`: the keys outside of groups."""
    path = next(p for f in config_folders(config_dirs) if (p := f / f"{ROOT}.yaml").is_file())
    card = read_card("", ROOT, path)
    return dataclasses.replace(card, keys=tuple(k for k in card.keys if k.name in TOP_KEYS))


def defaults() -> dict[str, str]:
    """The choice of every group where none is given."""
    path = built_in("configs") / f"{ROOT}.yaml"
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))["defaults"]
    return {
        group: choice
        for entry in listed
        if isinstance(entry, dict)
        for group, choice in entry.items()
    }


# -- What a file says ------------------------------------------------------------------------------
@cache
def read_card(group: str, choice: str, path: Path) -> Card:
    """A file's header and its keys with their comments."""
    text = text_of(path)
    header, lines = _header(text), list(_lines(text))
    target = next((value for key, value, _ in lines if key == "_target_"), "")
    takes = allowed_values(group, target)
    keys = tuple(Key(k, v, takes.get(k, ""), comment) for k, v, comment in lines if k != "_target_")
    command = next((line for line in header if line.startswith("peft-train")), "")
    summary = " ".join(line for line in header if not line.startswith(("peft-train", "@package")))
    return Card(group, choice, path, command, summary, target, keys)


def _header(text: str) -> list[str]:
    """The comment at the top, line by line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return lines


def _lines(text: str) -> Iterator[tuple[str, str, str]]:
    """(key, value, comment) of every top-level key; a value over several lines is joined."""
    lines = text.splitlines()
    for i, line in enumerate(lines):
        match = _LINE.fullmatch(line)
        if match is None:
            continue
        value = match["value"]
        for more in lines[i + 1 :]:
            if (value and not more.lstrip().startswith("#")) or not more.startswith((" ", "-")):
                break
            value = (
                value
                if value and more.lstrip().startswith("#")
                else f"{value} {more.strip()}".strip()
            )
        yield match["key"], value, match["comment"] or ""


# -- Finding a key ---------------------------------------------------------------------------------
def all_keys(config_dirs: Sequence[Path] = ()) -> dict[str, list[tuple[Card, Key]]]:
    """Every full key with the files that have it."""
    found: dict[str, list[tuple[Card, Key]]] = {}
    for card in [
        root_card(config_dirs),
        *(c for group in GROUPS for c in cards(group, config_dirs)),
    ]:
        for key in card.keys:
            found.setdefault(f"{card.group}.{key.name}".lstrip("."), []).append((card, key))
    return found


def find_method(name: str, config_dirs: Sequence[Path] = ()) -> Card:
    """The card of one method."""
    found = dict(sorted(choices("method", config_dirs).items()))
    same = {_letters(choice): choice for choice in found}
    name = same.get(_letters(name), name)
    if name not in found:
        if said := known(name, config_dirs):
            raise ConfigError(said)
        raise ConfigError(
            f"no method {name!r}.{did_you_mean(name, found)} All: {', '.join(sorted(found))}."
        )
    return read_card("method", name, found[name])


def known(name: str, config_dirs: Sequence[Path] = ()) -> str:
    """What to say of a method of the literature that is not built: what it does, and the nearest
    that is. Empty for a name that nobody knows.
    """
    read = yaml.safe_load((PACKAGE / "known_methods.yaml").read_text(encoding="utf-8"))
    entry = next((e for e in read.items() if _letters(e[0]) == _letters(name)), None)
    if entry is None:
        return ""
    title, (kind, idea, nearest) = entry
    built = {c: family(target) for c, target in targets("method", config_dirs).items()}
    near = [c for c in nearest.split() if c in built] or [c for c in built if built[c] == kind]
    return (
        f"{title} ({kind}: {idea}) is not a method here. Nearest: {near[0]}; "
        f"`peft-train methods {near[0]}` shows it."
    )


def _letters(name: str) -> str:
    """A name without case, spaces and dashes."""
    return re.sub(r"[^a-z0-9+]", "", name.lower())
