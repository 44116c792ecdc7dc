"""What is known of keys without loading anything: the files with their comments, and the types.

The verbs `methods` and `explain`, and every error message, read from here. No torch, no Hydra.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
import yaml

from peftcli import settings
from peftcli.errors import ConfigError, did_you_mean

PACKAGE = Path(__file__).parent
ROOT = "config"  # the file of the keys that are in no group
GROUPS = tuple(
    f.name for f in dataclasses.fields(settings.Run) if f.type in ("Any", f.name.title())
)
TOP_KEYS = {f.name: f for f in dataclasses.fields(settings.Run) if f.name not in GROUPS}
_LINE = re.compile(
    r"""(?P<key>\w+):\s*
        (?P<value>"(?:[^"\\]|\\.)*" | '[^']*' | \[[^\]]*\] | \{[^}]*\} | [^#]*?)\s*
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


# -- Where files are -------------------------------------------------------------------------------
def built_in(kind: Literal["configs", "recipes"]) -> Path:
    """The folder that comes with us: in the installed package, or beside it in a checkout."""
    installed = PACKAGE / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind


def config_folders(config_dirs: Iterable[Path] = ()) -> list[Path]:
    """Folders of groups, the user's first: what they add wins."""
    return [*config_dirs, built_in("configs")]


def recipe_folders(config_dirs: Iterable[Path] = ()) -> list[Path]:
    """Folders of recipes; in a user's folder both `recipe/` and `recipes/` may hold them."""
    theirs = [folder / name for folder in config_dirs for name in ("recipe", "recipes")]
    return [p for p in (*theirs, built_in("recipes")) if p.is_dir()]


def shown(path: Path) -> str:
    """A path as the user would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def recipes(config_dirs: Iterable[Path] = ()) -> dict[str, Path]:
    """Every recipe by its name."""
    found: dict[str, Path] = {}
    for folder in recipe_folders(config_dirs):
        for path in sorted(folder.rglob("*.yaml")):
            found.setdefault(str(path.relative_to(folder).with_suffix("")), path)
    return found


def choices(group: str, config_dirs: Iterable[Path] = ()) -> dict[str, Path]:
    """The files of a group by their names."""
    found: dict[str, Path] = {}
    for folder in config_folders(config_dirs):
        for path in sorted((folder / group).rglob("*.yaml")):
            found.setdefault(str(path.relative_to(folder / group).with_suffix("")), path)
    return found


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
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{shown(path)}: cannot be read ({e}).") from None
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


# -- What a key takes ------------------------------------------------------------------------------
def allowed_values(group: str, target: str) -> dict[str, str]:
    """In words, what each field of the class `target` may hold; nothing for libraries' classes."""
    if not group:
        return {
            name: in_words(hint) for name, hint in _hints(settings.Run).items() if name in TOP_KEYS
        }
    if group == "optimizer":
        return {
            k: in_words(hint)
            for k, hint in _hints(settings.Optimizer).items()
            if k in ("lr", "weight_decay")
        }
    if group == "method":
        return dict(_fields_in_source(target))
    cls = getattr(settings, target.rpartition(".")[2], None)
    return (
        {k: in_words(hint) for k, hint in _hints(cls).items()}
        if dataclasses.is_dataclass(cls)
        else {}
    )


def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


_SIMPLE = {
    types.NoneType: "null",
    bool: "true | false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Any: "anything",
}
_BOUNDS = {
    annotated_types.Ge: (">=", "ge"),
    annotated_types.Gt: (">", "gt"),
    annotated_types.Le: ("<=", "le"),
    annotated_types.Lt: ("<", "lt"),
}


def in_words(hint: Any) -> str:
    """A type as a user reads it: `int | None` is 'a whole number | null'."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = [_BOUNDS[type(mark)] + (mark,) for mark in args[1:] if type(mark) in _BOUNDS]
        return " ".join(
            [in_words(args[0]), " and ".join(f"{s} {getattr(m, a):g}" for s, a, m in bounds)]
        )
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(in_words(a) for a in args)
    if origin is tuple:
        return f"a list of {in_words(args[0])}"
    if origin is dict:
        return f"a mapping to {in_words(args[1])}"
    return _SIMPLE.get(hint, "a mapping")


def _fields_in_source(target: str) -> Iterator[tuple[str, str]]:
    """(field, values allowed) of a method's class, its bases first, read from its source."""
    source = _class_source(target)
    if source is None:
        return
    tree, cls = source
    for base in cls.bases:
        if isinstance(base, ast.Name):
            yield from _fields_in_source(
                _origin(tree, base.id) or f"{target.rpartition('.')[0]}.{base.id}"
            )
    for item in cls.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            annotation = ast.unparse(item.annotation)
            if not annotation.startswith("ClassVar"):
                yield item.target.id, _evaluated(annotation)


def _evaluated(annotation: str) -> str:
    """An annotation of our own source in words; as it stands where it uses names of its own."""
    names = {**vars(typing), **vars(annotated_types)}
    try:
        return in_words(eval(annotation, names))
    except NameError:
        return annotation


@cache
def _class_source(target: str) -> tuple[ast.Module, ast.ClassDef] | None:
    module, _, name = target.rpartition(".")
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    if not module.startswith("peftcli.") or not path.is_file():
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    cls = next(classes, None)
    return (tree, cls) if cls is not None else None


def _origin(tree: ast.Module, name: str) -> str | None:
    """Where an imported name is from."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
            return f"{node.module}.{name}"
    return None


def paper(target: str) -> str:
    """The docstring of the file that holds a method: the equation and its source."""
    source = _class_source(target)
    return (ast.get_docstring(source[0]) or "") if source else ""


def family(target: str) -> str:
    """The family of a method, its own or its base's."""
    source = _class_source(target)
    if source is None:
        return ""
    tree, cls = source
    for item in cls.body:
        if (
            isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and item.target.id == "family"
        ):
            return str(ast.literal_eval(item.value)) if item.value else ""
    bases = [_origin(tree, base.id) for base in cls.bases if isinstance(base, ast.Name)]
    return next((found for base in bases if base and (found := family(base))), "")


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
    found = {card.choice: card for card in cards("method", config_dirs)}
    if name not in found:
        raise ConfigError(
            f"no method {name!r}.{did_you_mean(name, found)} All: {', '.join(found)}."
        )
    return found[name]
