"""What a key takes, in words, from the types of its dataclass. No torch: methods are not imported
but read.
"""

from __future__ import annotations

import ast
import dataclasses
import re
import types
import typing
from functools import cache
from typing import Annotated, Any, Literal

import annotated_types
from annotated_types import Predicate

from peftcli import settings
from peftcli.sources import ancestry, assigned

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


@cache
def allowed_values(group: str, target: str) -> dict[str, str]:
    """In words, what each field of the class `target` may hold; nothing for libraries' classes."""
    if group == "method":
        return _of_source(target)
    ours = {"": settings.Command, "optimizer": settings.Optimizer}
    cls: Any = ours.get(group) or getattr(settings, target.rpartition(".")[2], None)
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: in_words(hint) for name, hint in hints.items()}


def _of_source(target: str) -> dict[str, str]:
    """What the fields of a method's class take, its bases' first, read from its source."""
    annotations = {
        name: (ast.unparse(field.annotation), cls.module)
        for cls in reversed(ancestry(target))
        for name, field in cls.fields.items()
    }
    return {n: _evaluated(*a) for n, a in annotations.items() if not a[0].startswith("ClassVar")}


@cache
def _evaluated(annotation: str, module: str) -> str:
    """An annotation of our own source in words; as it stands where a name of it cannot be found."""
    names = {**vars(typing), **vars(annotated_types), "re": re}

    def value(text: str) -> Any:
        while True:
            try:
                return eval(text, names)
            except NameError as e:
                if e.name is None or (alias := assigned(module, e.name)) is None:
                    raise
                names[e.name] = value(alias)

    try:
        return in_words(value(annotation))
    except NameError:
        return annotation


def in_words(hint: Any) -> str:
    """A type as a user reads it: `int | None` is 'a whole number | null'."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        bounds = [_BOUNDS[type(mark)] + (mark,) for mark in args[1:] if type(mark) in _BOUNDS]
        limits = [f"{s} {getattr(m, a):g}" for s, a, m in bounds]
        tests: list[Any] = [mark.func for mark in args[1:] if isinstance(mark, Predicate)]
        forms = [f"like {fullmatch.__self__.pattern}" for fullmatch in tests]
        return f"{in_words(args[0])} {' and '.join(limits + forms)}"
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(in_words(a) for a in args)
    if origin is tuple:
        return f"a list of {in_words(args[0])}"
    if origin is dict:
        return f"a mapping to {in_words(args[1])}"
    return _SIMPLE.get(hint, "a mapping")
