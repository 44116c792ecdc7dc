"""What a tuned sweep says at its end: test results, told apart from what tuning reached."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peftcli.screen import number
from peftcli.sweep import incumbent
from peftcli.sweep.ledger import ENDED, Trial
from peftcli.sweep.objective import Objective, mean
from peftcli.sweep.protocol import SEED, Study
from peftcli.sweep.space import values_of
from peftcli.versions import versions

Metrics = dict[str, float]
Block = tuple[str, dict[str, str]]  # a setting, and what there is to say of it


@dataclass(frozen=True)
class Result:
    """A frozen setting: its means over tuning and test seeds, and how much better tuning was."""

    cell: str
    overrides: tuple[str, ...]
    sha256: str  # of the overrides, as `incumbent.yaml` has it
    num_settings: int  # that it is the best of
    num_tuning_seeds: int
    tuning: Metrics
    test_seeds: tuple[int, ...]
    num_failed: int  # test runs that are not in the mean
    test: Metrics
    test_std: Metrics  # of samples; empty below two
    gap: Metrics


def results(study: Study, folder: Path, trials: Sequence[Trial]) -> list[Result]:
    """Every frozen setting whose test runs have ended."""
    frozen, goal = incumbent.read(folder), study.objective(trials)
    by_name = {frozenset(trial.overrides): trial for trial in trials}
    listed = []
    for chosen in frozen["incumbents"] if frozen else ():
        wanted = [study.member(chosen["overrides"], s, test=True) for s in study.sweep.test_seeds]
        runs = [by_name[frozenset(run)] for run in wanted if frozenset(run) in by_name]
        ended = [trial for trial in runs if trial.state in ENDED]
        if len(ended) == len(wanted):
            listed.append(_result(chosen, ended, goal))
    return listed


def _result(chosen: Mapping[str, Any], ended: Sequence[Trial], goal: Objective) -> Result:
    scores = [s for t in ended if t.state == "done" and (s := goal.scores(t.metrics))]
    test = goal.shown(mean(scores)) if scores else {}
    columns = zip(*(goal.shown(s).values() for s in scores), strict=True)
    deviations = [statistics.stdev(column) for column in columns] if len(scores) > 1 else []
    return Result(
        cell=chosen["cell"],
        overrides=tuple(chosen["overrides"]),
        sha256=chosen["sha256"],
        num_settings=chosen["num_settings"],
        num_tuning_seeds=chosen["num_tuning_seeds"],
        tuning=chosen["tuning"],
        test_seeds=tuple(int(values_of(t.overrides)[SEED]) for t in ended),
        num_failed=len(ended) - len(scores),
        test=test,
        test_std=dict(zip(goal.names, deviations, strict=False)),
        gap={
            name: sign * (chosen["tuning"][name] - test[name])
            for name, sign in zip(goal.names, goal.signs, strict=True)
            if name in test
        },
    )


def blocks(found: Sequence[Result]) -> list[Block]:
    """What the screen shows of each result."""
    return [(" ".join(r.overrides), _told(r)) for r in found]


def _told(r: Result) -> dict[str, str]:
    spread = {name: f" +- {number(s)}" for name, s in r.test_std.items()}
    test = [f"{name} {number(v)}{spread.get(name, '')}" for name, v in r.test.items()]
    ended = f"{len(r.test_seeds) - r.num_failed} of {len(r.test_seeds)} test seeds"
    return {
        "test": f"{'  '.join(test) or '-'}  ({ended})",
        "tuning": f"{_written(r.tuning)}  {_origin(r.num_tuning_seeds, r.num_settings)}",
        "gap": "  ".join(f"{name} {gap:+.4f}" for name, gap in r.gap.items()) or "-",
    }


def best_so_far(study: Study, trials: Sequence[Trial]) -> list[Block]:
    """The best settings by their tuning runs."""
    goal, found = study.objective(trials), []
    for cell, tuned in zip(study.cells, study.tuned(trials), strict=True):
        for point in tuned.best:
            scores = tuned.mean(point)
            assert scores is not None
            origin = _origin(len(tuned.ended(point)), len(tuned.points))
            told = {"tuning": f"{_written(goal.shown(scores))}  {origin}"}
            found.append((" ".join((*cell.fixed, *point)), told))
    return found


def _written(metrics: Metrics) -> str:
    return "  ".join(f"{name} {number(value)}" for name, value in metrics.items())


def _origin(num_seeds: int, num_settings: int) -> str:
    return (
        f"(1 seed, best of {num_settings})"
        if num_seeds == 1
        else (f"(mean of {num_seeds} seeds, best of {num_settings})")
    )


def checklist(
    study: Study, folder: Path, trials: Sequence[Trial], line: Sequence[str]
) -> dict[str, Any]:
    """What a reader needs to judge a tuned result, after the checklist of Eimer et al. (2023,
    appendix); no entry is empty.
    """
    sweep, goal = study.sweep, study.objective(trials)
    frozen = incumbent.read(folder)
    assert frozen is not None
    signs = dict(zip(goal.names, goal.signs, strict=True))
    apart = (
        f"test runs are of other data ({sweep.report_on})"
        if sweep.report_on
        else "tuning runs evaluate one half of the held-out examples, test runs the other "
        "(dataset.eval_part)"
    )
    return {
        "separation": f"tuning and test seeds are disjoint; {apart}",
        "search": {"kind": sweep.search, "seed": sweep.search_seed},
        "space": study.space.describe(),
        "metric": {n: "maximize" if s > 0 else "minimize" for n, s in signs.items()},
        "budget": frozen["budget"],
        "budget_is_equal": "checked before anything was frozen",
        "lr_scale": sweep.lr_scale or "none",
        "pruning": sweep.prune,
        "tuning_seeds": list(study.seeds),
        "test_seeds": list(sweep.test_seeds),
        "incumbents": frozen["incumbents"],
        "results": [asdict(r) for r in results(study, folder, trials)],
        "line": list(line),
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": versions(),
    }
