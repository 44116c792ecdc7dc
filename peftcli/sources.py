"""Our own Python files, read without importing them, so without torch.

ruff formats them and a test compares: a class is its `class` line and what is indented below, a
statement of it starts with four spaces. So a file is cut by its lines, and only the statements
that are asked for are parsed; parsing all files of all methods takes a quarter of a second.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from peftcli.folders import PACKAGE

_DOCSTRING = re.compile(r'\s*r?""".*?"""', re.DOTALL)
_IMPORT = re.compile(r"^from ([\w.]+) import (?:\(([^)]*)\)|(.+))$", re.MULTILINE)
_CLASS = re.compile(r"^class (\w+)(?:\(([^)]*)\))?:.*\n((?:\n|    .*\n)*)", re.MULTILINE)
_DEEPER = r"(?:(?:     .*|    [)\]}].*)?\n)*"  # the further lines of a statement in a class
_FIELD = re.compile(rf"^    \w+: .*\n{_DEEPER}", re.MULTILINE)
_METHOD = re.compile(rf"^    def (\w+)\(.*\n{_DEEPER}", re.MULTILINE)


@dataclass(frozen=True)
class Class:
    """A class as it is written."""

    module: str
    name: str
    bases: tuple[str, ...]  # full names of those that are plain names
    body: str  # without its docstring

    @cached_property
    def fields(self) -> dict[str, ast.AnnAssign]:
        """The annotated names in their order."""
        body = _parsed(_FIELD.findall(self.body))
        return {ast.unparse(f.target): f for f in body if isinstance(f, ast.AnnAssign)}

    @cached_property
    def methods(self) -> dict[str, str]:
        """The text of each function."""
        return {found[1]: found[0] for found in _METHOD.finditer(self.body)}

    def method(self, name: str) -> list[ast.stmt]:
        """The body of a function; empty where there is none of that name."""
        found = _parsed([self.methods[name]] if name in self.methods else [])
        return found[0].body if found and isinstance(found[0], ast.FunctionDef) else []


def _parsed(statements: list[str]) -> list[ast.stmt]:
    """Statements of a class, indented as they are there."""
    if not statements:
        return []
    (cls,) = ast.parse("class _:\n" + "".join(statements)).body
    return cls.body if isinstance(cls, ast.ClassDef) else []


@dataclass(frozen=True, eq=False)
class Source:
    """A file as it is written."""

    text: str
    docstring: str
    imports: dict[str, str]  # imported name -> where it is from
    classes: dict[str, Class]


@cache
def source(module: str) -> Source | None:
    """A file of ours; None for a module that is not ours."""
    path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    if not module.startswith("peftcli.") or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    docstring, code = _split(text)
    imports: dict[str, str] = {}
    for origin, several, one in _IMPORT.findall(code):
        for name in re.findall(r"\w+", several or one):
            imports.setdefault(name, origin)
    classes = {}
    for name, bases, body in _CLASS.findall(code):
        named = [base for base in map(str.strip, bases.split(",")) if base.isidentifier()]
        full = tuple(f"{imports.get(base, module)}.{base}" for base in named)
        classes[name] = Class(module, name, full, _split(body)[1])
    return Source(text, docstring, imports, classes)


def _split(text: str) -> tuple[str, str]:
    """A docstring and what follows it."""
    if (found := _DOCSTRING.match(text)) is None:
        return "", text
    return inspect.cleandoc(ast.literal_eval(found[0].strip())), text[found.end() :]


def class_at(target: str) -> Class | None:
    """A class of ours by its full name."""
    module, _, name = target.rpartition(".")
    found = source(module)
    return found.classes.get(name) if found else None


@cache
def ancestry(target: str) -> tuple[Class, ...]:
    """A class of ours and its bases of ours, nearest first."""
    cls = class_at(target)
    return (cls, *(a for base in cls.bases for a in ancestry(base))) if cls else ()


def assigned(module: str, name: str) -> str | None:
    """What a file of ours, or the one that it imports the name from, says after `name = `."""
    if (found := source(module)) is None:
        return None
    if name in found.imports:
        return assigned(found.imports[name], name)
    value = re.search(rf"^{name} = (.*\n(?:[ )\]].*\n)*)", found.text, re.MULTILINE)
    return value[1] if value else None


def class_value(target: str, name: str) -> Any:
    """What a class says of itself under `name`, or its first base that does; None where none
    does, or where it depends on the options (a property).
    """
    for cls in ancestry(target):
        if name in cls.methods:
            return None
        if f"    {name}: " not in cls.body or (field := cls.fields.get(name)) is None:
            continue
        try:
            return ast.literal_eval(field.value) if field.value else None
        except ValueError:
            continue
    return None


def files_of(target: str) -> Iterator[Source]:
    """What a method is made of: its own file, and those of peftcli.methods that it imports."""
    seen, waiting = set[str](), [target.rpartition(".")[0]]
    while waiting:
        module = waiting.pop()
        if module in seen or (found := source(module)) is None:
            continue
        seen.add(module)
        yield found
        waiting += [m for m in found.imports.values() if m.startswith("peftcli.methods.")]
