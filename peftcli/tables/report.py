"""One HTML page with everything about many runs: no network, nothing to install, all text inert."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftcli.tables.cells import Plan, is_scored
from peftcli.tables.protocol import is_tuned, same, short, value
from peftcli.tables.render import Table
from peftcli.tables.runs import GROUP_WORDS, RunRecord
from peftcli.tables.series import COSTS, curves, points, thinned
from peftcli.train.better import HIGHER_IS_BETTER

PAGE = Path(__file__).parent / "page"
POINTS = 150  # of one curve at most: 200 runs stay a page of a few megabytes
BOOKKEEPING = ("run_dir", "resume", "logger")


def page(runs: Sequence[RunRecord], table: Table, plan: Plan) -> str:
    """The page. The data stand in it as JSON whose `<` are escaped, so that no name in them can end
    the element; the script shows them as text only.
    """
    data = json.dumps(_data(runs, table, plan), separators=(",", ":"), allow_nan=False)
    text = (PAGE / "report.html").read_text(encoding="utf-8")
    for slot, content in (
        ("/*style*/", (PAGE / "report.css").read_text(encoding="utf-8")),
        ("/*script*/", (PAGE / "report.js").read_text(encoding="utf-8")),
        ("/*data*/", data.replace("<", "\\u003c")),  # last: what it holds is not looked into
    ):
        text = text.replace(slot, content, 1)
    return text


def _data(runs: Sequence[RunRecord], table: Table, plan: Plan) -> dict[str, Any]:
    """What the script reads."""
    keys = _varying(runs, [*plan.keys, "seed"])
    return {
        "title": table.title,
        "metric": plan.metric,
        "per_cent": plan.metric in HIGHER_IS_BETTER,
        "table": {
            "header": [[c.title, table.is_number(i)] for i, c in enumerate(table.header)],
            "rows": [[[c.text, c.value, c.bold] for c in row] for row in table.rows],
            "remarks": table.remarks,
        },
        "costs": {
            axis: [[p.label, p.cost, p.score, p.on_front] for p in points(table, plan.metric, key)]
            for key, axis in COSTS.items()
        },
        "keys": keys,
        "runs": [_run(run, keys, plan) for run in runs],
    }


def _run(run: RunRecord, keys: Sequence[str], plan: Plan) -> dict[str, Any]:
    return {
        "name": run.name,
        "group": short(value(run, plan.rows[0])),
        "state": run.state,
        "value": run.metrics[plan.metric] if is_scored(run, plan.metric) else None,
        "keys": [_shown(run.keys[key]) if key in run.keys else None for key in keys],
        "curves": {name: thinned(curve, POINTS) for name, curve in curves(run).items()},
    }


def _shown(given: Any) -> Any:
    """A value that the page can sort: numbers and text as they are, others as they are typed."""
    is_plain = isinstance(given, str | int) or (isinstance(given, float) and math.isfinite(given))
    return given if is_plain and not isinstance(given, bool) else json.dumps(given, default=str)


def _varying(runs: Sequence[RunRecord], first: Sequence[str]) -> list[str]:
    """The keys in which runs differ, `first` first. The options of a method, which differ between
    methods anyway, only where they differ within one.
    """
    values: dict[str, dict[str, set[str]]] = {key: {} for key in first}
    for run in runs:
        for key, given in run.keys.items():
            group = key.partition(".")[0]
            within = run.keys.get(group) if is_tuned(key) and key != group else None
            values.setdefault(key, {}).setdefault(same(within), set()).add(same(given))
    left_out = {f"{group}._target_" for group in GROUP_WORDS}
    return [
        key
        for key, found in values.items()
        if any(len(some) > 1 for some in found.values())
        and key not in left_out
        and not key.startswith(BOOKKEEPING)
    ]
