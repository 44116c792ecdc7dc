"""Why two runs have different numbers: what was asked, what it ran on, and where they part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from peftcli.catalog import screen, table
from peftcli.tables.protocol import facts, same, short
from peftcli.tables.runs import CALLED, GROUP_WORDS, RunRecord

ABSENT = "-"
HERE = ("name", "run_dir", "resume")  # where and under what name, not what
REPEATED = {*CALLED, *(f"{group}._target_" for group in GROUP_WORDS)}  # said by another key


@dataclass(frozen=True)
class Two:
    """A thing that the runs have differently; `ABSENT` where one has no such thing."""

    what: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Departure:
    """The first record of metrics.jsonl in which the runs differ."""

    step: int
    same_steps: int  # records before it, equal bit for bit
    values: tuple[Two, ...]
    largest: Two | None  # the step's losses where they are farthest apart
    largest_step: int | None


@dataclass(frozen=True)
class Diff:
    """All that two runs differ in."""

    metrics: tuple[Two, ...]
    configuration: tuple[Two, ...]
    circumstances: tuple[Two, ...]  # hashes, versions, hardware
    same_start: bool | None  # whether what trains began with the same bits
    departure: Departure | None
    why: str


def compare(a: RunRecord, b: RunRecord) -> Diff:
    """The differences of two runs, in the order of cause and effect."""
    said = {*HERE, *REPEATED}
    left, right = ({k: v for k, v in run.keys.items() if k not in said} for run in (a, b))
    configuration = tuple(_unequal(left, right))
    circumstances = tuple(_unequal(_circumstances(a), _circumstances(b)))
    starts = [run.meta_info.get("state_before_sha256") for run in (a, b)]
    same_start = starts[0] == starts[1] if all(starts) else None
    departure = _departure(a.steps, b.steps)
    return Diff(
        metrics=tuple(_unequal(a.metrics, b.metrics)),
        configuration=configuration,
        circumstances=circumstances,
        same_start=same_start,
        departure=departure,
        why=_why(configuration, circumstances, same_start, departure),
    )


def _circumstances(run: RunRecord) -> dict[str, Any]:
    return facts(run) | dict(run.meta_info.get("system_info", {}))


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Two]:
    for key in dict.fromkeys([*a, *b]):
        if same(a.get(key)) != same(b.get(key)):
            yield Two(key, a.get(key, ABSENT), b.get(key, ABSENT))


# -- The curves ------------------------------------------------------------------------------------
def _departure(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]]) -> Departure | None:
    """Where two curves part; None where one is the beginning of the other."""
    left, right = ([{k: v for k, v in r.items() if k != "wall"} for r in run] for run in (a, b))
    pairs = list(zip(left, right, strict=False))
    first = next((i for i, (x, y) in enumerate(pairs) if same(x) != same(y)), None)
    if first is None:
        return None
    apart = [
        (abs(x["loss"] - y["loss"]), x["step"], Two("loss", x["loss"], y["loss"]))
        for x, y in pairs
        if "loss" in x and "loss" in y and math.isfinite(x["loss"] - y["loss"])
    ]
    _, step, most = max(apart, key=lambda one: one[0], default=(0.0, None, None))
    values = tuple(_unequal(*pairs[first]))
    return Departure(pairs[first][0]["step"], first, values, most, step)


def _why(
    configuration: Sequence[Two],
    circumstances: Sequence[Two],
    same_start: bool | None,
    departure: Departure | None,
) -> str:
    """One sentence: the first thing in the chain of causes that differs."""
    changed = {two.what for two in circumstances}
    words = [two.what for two in configuration]
    if "method" in words:  # its options come with it
        words = [word for word in words if not word.startswith("method.")]
    keys = ", ".join(words)
    if changed & {"dataset.sha256", "model.sha256", "task"}:
        listed = ", ".join(sorted(changed & {"dataset.sha256", "model.sha256", "task"}))
        asked = f"; asked otherwise: {keys}" if keys else ""
        return f"They saw different data or base weights ({listed}){asked}."
    if keys:
        start = {True: "the same", False: "different", None: "unknown"}[same_start]
        return f"They were asked for different things ({keys}); initial weights: {start}."
    if changed:
        return f"They were asked for the same and ran on something else ({', '.join(changed)})."
    if same_start is False:
        return "Nothing recorded differs, but what trains began with different bits."
    if departure is not None:
        return "Nothing recorded differs, and the curves part: something is not deterministic."
    return "Nothing recorded differs."


# -- The screen ------------------------------------------------------------------------------------
def show(a: RunRecord, b: RunRecord, found: Diff, as_json: bool) -> None:
    """The differences on standard output."""
    if as_json:
        print(json.dumps({"a": a.name, "b": b.name, **asdict(found)}, indent=2, default=str))
        return
    out = screen()
    out.print(Text(f"a  {a.name}\nb  {b.name}\n"), soft_wrap=True)
    out.print(Text(found.why, style="bold"), soft_wrap=True)
    parts = {
        "metrics after training": [(*_row(two), _difference(two)) for two in found.metrics],
        "configuration": [(*_row(two), "") for two in found.configuration],
        "hashes, versions, hardware": [(*_row(two), "") for two in found.circumstances],
        "curves": list(_curve_rows(found.departure)),
    }
    for title, rows in parts.items():
        if rows:
            out.print()
            out.print(table("", "a", "b", "b - a", rows=rows, title=title))
    start = {True: "the same bits", False: "different bits", None: "not recorded"}
    out.print(f"\nweights at step 0: {start[found.same_start]}")
    if found.departure is None:
        out.print("metrics.jsonl: no common step differs")


def _row(two: Two) -> tuple[str, str, str]:
    return two.what, _text(two.a), _text(two.b)


def _text(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, float) else short(value)


def _difference(two: Two) -> str:
    numbers = all(isinstance(v, int | float) for v in (two.a, two.b))
    return f"{two.b - two.a:+.3g}" if numbers else ""


def _curve_rows(departure: Departure | None) -> Iterator[tuple[str, str, str, str]]:
    if departure is None:
        return
    for two in departure.values:
        what = f"step {departure.step}: {two.what}, the first to differ"
        yield what, *_row(two)[1:], _difference(two)
    if departure.largest is not None and departure.largest_step != departure.step:
        two = departure.largest
        what = f"step {departure.largest_step}: {two.what}, farthest apart"
        yield what, *_row(two)[1:], _difference(two)
