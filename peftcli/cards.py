"""What is known of keys without loading anything: the files with their comments, and the types.

The verbs `methods` and `explain`, and every error message, read from here. No torch, no Hydra.
"""

from __future__ import annotations

import ast
import contextlib
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


def listed(group: str, config_dirs: Iterable[Path] = ()) -> list[Card]:
    """The cards of a group without their keys, which take most of the time to explain."""
    found = []
    for choice, path in sorted(choices(group, config_dirs).items()):
        lines = _lines(path.read_text(encoding="utf-8"))
        target = next((value for key, value, _ in lines if key == "_target_"), "")
        found.append(Card(group, choice, path, "", "", target, ()))
    return found


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


@cache
def _evaluated(annotation: str) -> str:
    """An annotation of our own source in words; as it stands where it uses names of its own."""
    names = {**vars(typing), **vars(annotated_types)}
    try:
        return in_words(eval(annotation, names))
    except NameError:
        return annotation


@cache
def _tree(module: str) -> ast.Module | None:
    """A file of ours, parsed."""
    text = _source(module)
    return ast.parse(text) if text else None


@cache
def _source(module: str) -> str:
    """The text of a file of ours; empty for a module that is not ours."""
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    if not module.startswith("peftcli.") or not path.is_file():
        return ""
    return path.read_text(encoding="utf-8")


@cache
def _class_source(target: str) -> tuple[ast.Module, ast.ClassDef] | None:
    module, _, name = target.rpartition(".")
    if (tree := _tree(module)) is None:
        return None
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
    return class_value(target, "family") or ""


def class_value(target: str, name: str) -> Any:
    """What a class says of itself under `name`, or its first base that does; None where none
    does, or where it depends on the options (a property).
    """
    for _, cls, _ in _ancestry(target):
        for item in cls.body:
            if isinstance(item, ast.FunctionDef) and item.name == name:
                return None
            if isinstance(item, ast.AnnAssign) and ast.unparse(item.target) == name:
                with contextlib.suppress(ValueError):
                    return ast.literal_eval(item.value) if item.value else None
    return None


def _ancestry(target: str) -> Iterator[tuple[str, ast.ClassDef, ast.Module]]:
    """(module, class, file) of a class of ours and its bases of ours, nearest first."""
    source = _class_source(target)
    if source is None:
        return
    tree, cls = source
    module = target.rpartition(".")[0]
    yield module, cls, tree
    for base in cls.bases:
        if isinstance(base, ast.Name):
            yield from _ancestry(_origin(tree, base.id) or f"{module}.{base.id}")


def _modules_of(target: str) -> dict[str, ast.Module]:
    """The files that a method is made of: its own, and those of peftcli.methods that it imports."""
    found: dict[str, ast.Module] = {}
    waiting = [target.rpartition(".")[0]]
    while waiting:
        module = waiting.pop()
        if module in found or (tree := _tree(module)) is None:
            continue
        found[module] = tree
        waiting += [
            node.module
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith("peftcli.methods.")
            and node.module is not None
        ]
    return found


DELTA, FOLDING = "peftcli.core.delta.Delta", "peftcli.core.delta.WeightDelta"
_PRE_PASS = re.compile(r"\b(each_gradient|mean_gradients|each_input|data\.batches)\(")


def folds(target: str) -> bool:
    """Whether the method's equation says how it folds into a weight; what trains the base's own
    weights has nothing to fold.
    """
    if class_value(target, "family") == "selective":
        return True
    deltas = [
        [f"{m}.{c.name}" for m, c, _ in _ancestry(f"{module}.{node.name}")]
        for module, tree in _modules_of(target).items()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    ]
    return any(
        DELTA in names and (FOLDING in names or _defines_merged(names[:-1])) for names in deltas
    )


def _defines_merged(names: Sequence[str]) -> bool:
    for name in names:
        source = _class_source(name)
        for item in source[1].body if source else ():
            if isinstance(item, ast.FunctionDef) and item.name == "merged":
                return not all(isinstance(line, ast.Expr | ast.Raise) for line in item.body)
    return False


def looks_at_data(target: str) -> bool:
    """Whether the method, with some of its options, looks at the task before it trains."""
    return any(_PRE_PASS.search(_source(module)) for module in _modules_of(target))


@dataclass(frozen=True)
class Traits:
    """What a method goes with, as its source says."""

    family: str
    modalities: tuple[str, ...]
    mergeable: bool
    quantisable: bool
    pre_pass: bool
    exports: str  # a type of Hugging Face peft, `model`, or `own`


@cache
def traits(target: str) -> Traits:
    """Read off the class of a method and the files that it is made of."""
    kind = family(target)
    bridge = kind == "bridge"  # to all of peft's types
    theirs = "" if bridge else class_value(target, "peft_type")
    whole = class_value(target, "publishes_model")
    return Traits(
        kind,
        class_value(target, "modalities") or (("text",) if kind == "prompt" else ("text", "image")),
        folds(target),
        class_value(target, "on_quantised") is not False,
        looks_at_data(target),
        "model" if whole else f"peft {theirs}".strip() if theirs or bridge else "own",
    )


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
    same = {_letters(choice): choice for choice in found}
    name = same.get(_letters(name), name)
    if name not in found:
        if said := known(name, config_dirs):
            raise ConfigError(said)
        raise ConfigError(
            f"no method {name!r}.{did_you_mean(name, found)} All: {', '.join(found)}."
        )
    return found[name]


def known(name: str, config_dirs: Sequence[Path] = ()) -> str:
    """What to say of a method of the literature that is not built: what it does, and the nearest
    that is. Empty for a name that nobody knows.
    """
    read = yaml.safe_load((PACKAGE / "known_methods.yaml").read_text(encoding="utf-8"))
    entry = next((e for e in read.items() if _letters(e[0]) == _letters(name)), None)
    if entry is None:
        return ""
    title, (kind, idea, nearest) = entry
    built = {card.choice: family(card.target) for card in cards("method", config_dirs)}
    near = [c for c in nearest.split() if c in built] or [c for c in built if built[c] == kind]
    return (
        f"{title} ({kind}: {idea}) is not a method here. Nearest: {near[0]}; "
        f"`peft-train methods {near[0]}` shows it."
    )


def _letters(name: str) -> str:
    """A name without case, spaces and dashes."""
    return re.sub(r"[^a-z0-9+]", "", name.lower())
