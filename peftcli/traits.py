"""What a method goes with, as its source says: family, data, merging, format. No torch.

The verb `methods` lists these and chooses by them.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache

from peftcli.sources import Class, Source, ancestry, class_at, class_value, files_of, source

DELTA, FOLDING = "peftcli.core.delta.Delta", "peftcli.core.delta.WeightDelta"
_PRE_PASS = re.compile(r"\b(each_gradient|mean_gradients|each_input|input_grams|data\.batches)\(")


@dataclass(frozen=True)
class Traits:
    """What a method goes with, as its source says."""

    family: str
    modalities: tuple[str, ...]
    mergeable: bool
    quantisable: bool
    pre_pass: bool
    exports: str  # a type of Hugging Face peft, `model`, or `own`
    counted: bool  # a model's dimensions alone say how many numbers train


@cache
def traits(target: str) -> Traits:
    """Read off the class of a method and the files that it is made of."""
    kind = family(target)
    bridge = kind == "bridge"  # to all of peft's types
    theirs = "" if bridge else class_value(target, "peft_type")
    whole = class_value(target, "publishes_model")
    return Traits(
        kind,
        class_value(target, "modalities") or (),
        folds(target),
        class_value(target, "on_quantised") is not False,
        looks_at_data(target),
        "model" if whole else f"peft {theirs}".strip() if theirs or bridge else "own",
        not _defines(target, "num_chosen"),
    )


def paper(target: str) -> str:
    """The docstring of the file that holds a method: the equation and its source."""
    found = source(target.rpartition(".")[0]) if class_at(target) else None
    return found.docstring if found else ""


def family(target: str) -> str:
    """The family of a method, its own or its base's."""
    return class_value(target, "family") or ""


def folds(target: str) -> bool:
    """Whether the method's equation says how it folds into a weight, or the method how it folds
    into the model; what trains the base's own weights has nothing to fold.
    """
    if family(target) == "selective" or _defines(target, "before_merge"):
        return True
    return any(map(_has_folding_delta, files_of(target)))


@cache
def _has_folding_delta(file: Source) -> bool:
    return any(map(_folds, file.classes.values()))


def _folds(cls: Class) -> bool:
    """Whether a class is a delta with a `merged` that does more than raise."""
    line = ancestry(f"{cls.module}.{cls.name}")
    names = [f"{c.module}.{c.name}" for c in line]
    return DELTA in names and (FOLDING in names or _defines_merged(line[:-1]))


def _defines_merged(line: tuple[Class, ...]) -> bool:
    nearest = next((c for c in line if "merged" in c.methods), None)
    body = nearest.method("merged") if nearest else []
    return not all(isinstance(statement, ast.Expr | ast.Raise) for statement in body)


def _defines(target: str, name: str) -> bool:
    """Whether a method has a function of its own in place of `Method`'s."""
    return any(name in cls.methods for cls in ancestry(target) if cls.name != "Method")


def looks_at_data(target: str) -> bool:
    """Whether the method, with some of its options, looks at the task before it trains."""
    return any(map(_has_pre_pass, files_of(target))) and _takes_data(target)


@cache
def _has_pre_pass(file: Source) -> bool:
    return _PRE_PASS.search(file.text) is not None


def _takes_data(target: str) -> bool:
    """Whether the method's `setup` does more with the data than hand them to its base's."""
    for cls in (c for c in ancestry(target) if "setup" in c.methods):
        nodes = [node for statement in cls.method("setup") for node in ast.walk(statement)]
        uses = sum(isinstance(node, ast.Name) and node.id == "data" for node in nodes)
        handed_on = cls.methods["setup"].count("super().setup(host, data)")
        if uses > handed_on or not handed_on:
            return uses > handed_on
    return False
