"""The second stage: the best settings, frozen in `incumbent.yaml`, run on the test seeds, and told
apart from what they reached in tuning.
"""

from __future__ import annotations

import hashlib
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peftcli import __version__
from peftcli.errors import ConfigError, DataError
from peftcli.sweep.protocol import SEED, Study
from peftcli.sweep.results import PENDING, Results, Trial
from peftcli.sweep.space import Point, values_of

FILE = "incumbent.yaml"


def propose(study: Study, folder: Path, trials: Sequence[Trial]) -> list[Point]:
    """The runs to plan next, each as its overrides; nothing where all there is still runs, or where
    the sweep is over. To be called by one process at a time: it freezes the incumbents.

    Raises:
        ConfigError: budgets were not equal, or the folder's incumbents were tuned otherwise.
    """
    frozen = read(folder)
    if frozen is None:
        found = study.tuned(trials)
        wanted = study.to_tune(found)
        still = any(results.pending for results in found)
        if wanted or still or not study.is_reported:
            return wanted
        study.require_equal_budgets(found)
        frozen = freeze(study, found, trials)
        write(folder, frozen)
    if frozen["digest"] != study.digest:
        raise ConfigError(
            f"{folder / FILE}: was frozen for another space, budget or other seeds, and has been "
            "tested. Change them in another sweep_dir."
        )
    return study.to_test([i["overrides"] for i in frozen["incumbents"]], trials)


def freeze(study: Study, found: Sequence[Results], trials: Sequence[Trial]) -> dict[str, Any]:
    """What `incumbent.yaml` holds: each cell's best setting (of several metrics, its Pareto front),
    and all that chose it.
    """
    goal = study.objective(trials)
    incumbents = []
    for cell, results in zip(study.cells, found, strict=True):
        for point in results.best:
            scores = results.mean(point)
            assert scores is not None
            overrides = [*cell.fixed, *point]
            incumbents.append(
                {
                    "cell": cell.name,
                    "overrides": overrides,
                    "sha256": hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest(),
                    "tuning": goal.shown(scores),
                    "num_tuning_seeds": len(results.ended(point)),
                    "num_settings": len(results.points),
                }
            )
    return {
        "digest": study.digest,
        "peftcli": __version__,
        "space": study.space.digest(),
        "budget": study.budget,
        "incumbents": incumbents,
    }


def read(folder: Path) -> dict[str, Any] | None:
    """The frozen settings of a sweep; None before they are.

    Raises:
        DataError: the file is broken.
    """
    path = folder / FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise DataError(f"{path}: cannot be read ({e}).") from None
    if not isinstance(found, dict) or not {"digest", "incumbents"} <= found.keys():
        raise DataError(f"{path}: holds no incumbents. Take it away to have them chosen again.")
    return found


def write(folder: Path, frozen: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    aside = folder / f".{FILE}"
    head = "# The best settings, frozen before any run on the test seeds.\n"
    aside.write_text(head + yaml.safe_dump(dict(frozen), sort_keys=False), encoding="utf-8")
    aside.replace(folder / FILE)


# -- the report ------------------------------------------------------------------------------------
def tested(study: Study, incumbent: Mapping[str, Any], trials: Sequence[Trial]) -> list[Trial]:
    """The test runs of a frozen setting, in the order of the seeds."""
    mine = [study.member(incumbent["overrides"], s, test=True) for s in study.sweep.test_seeds]
    by_name = {frozenset(trial.overrides): trial for trial in trials}
    return [by_name[frozenset(run)] for run in mine if frozenset(run) in by_name]


def results(study: Study, folder: Path, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Of every frozen setting: tuning mean, test mean, standard deviation (of two seeds and more)
    and the gap between them, by metric; nothing before all its test runs have ended.
    """
    frozen, goal = read(folder), study.objective(trials)
    listed: list[dict[str, Any]] = []
    for incumbent in frozen["incumbents"] if frozen else ():
        runs = tested(study, incumbent, trials)
        ended = [t for t in runs if t.state not in PENDING]
        if len(ended) < len(study.sweep.test_seeds):
            continue
        scores = [s for t in ended if t.state == "done" and (s := goal.scores(t.metrics))]
        columns = [goal.shown(s) for s in scores]
        test = {n: statistics.fmean(c[n] for c in columns) for n in goal.names if columns}
        listed.append(
            {
                **incumbent,
                "test_seeds": [int(values_of(t.overrides)[SEED]) for t in ended],
                "failed": len(ended) - len(scores),
                "test": test,
                "test_std": {n: statistics.stdev(c[n] for c in columns) for n in test}
                if len(columns) > 1
                else {},
                "gap": {n: incumbent["tuning"][n] - value for n, value in test.items()},
            }
        )
    return listed


def lines(study: Study, folder: Path, trials: Sequence[Trial]) -> list[str]:
    """What the screen shows of the two stages; before the second, the best settings so far."""
    found, goal = study.tuned(trials), study.objective(trials)
    shown = []
    listed = results(study, folder, trials)
    for r in listed:
        for name, value in r["test"].items():
            spread = f" +- {r['test_std'][name]:.4g}" if r["test_std"] else ""
            shown.append(
                f"{' '.join(r['overrides'])}: {name} {value:.4g}{spread} on "
                f"{len(r['test_seeds'])} test seeds; {r['tuning'][name]:.4g} on "
                f"{r['num_tuning_seeds']} tuning seed{'s'[: r['num_tuning_seeds'] > 1]} "
                f"(gap {r['gap'][name]:+.4g}), best of {r['num_settings']}"
            )
        if r["failed"]:
            shown.append(f"  {r['failed']} of its test runs failed and are not in the mean")
    if listed:
        return shown
    for cell, cell_results in zip(study.cells, found, strict=True):
        for point in cell_results.best:
            scores = cell_results.mean(point)
            assert scores is not None
            told = ", ".join(f"{n} {v:.4g}" for n, v in goal.shown(scores).items())
            number = len(cell_results.ended(point))
            shown.append(
                f"best of {len(cell_results.points)}: {' '.join((*cell.fixed, *point))}: {told}"
                f" (mean of {number} tuning seed{'s'[: number > 1]})"
            )
    return shown


def checklist(
    study: Study, folder: Path, trials: Sequence[Trial], line: Sequence[str]
) -> dict[str, Any]:
    """What a reader needs to judge a tuned result, in the order of the checklist of Eimer et al.;
    no entry is empty.
    """
    sweep, goal = study.sweep, study.objective(trials)
    return {
        "separation": "tuning and test seeds are disjoint; tuning runs evaluate one half of the "
        "held-out examples, test runs the other (dataset.eval_part)",
        "tool": {"peftcli": __version__, "search": sweep.search, "seed": sweep.search_seed},
        "space": study.space.describe(),
        "metric": {
            n: "max" if s > 0 else "min" for n, s in zip(goal.names, goal.signs, strict=True)
        },
        "budget": study.budget,
        "budget_is_equal": True,  # refused otherwise
        "lr_scale": sweep.lr_scale or "none",
        "pruning": sweep.prune,
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count()},
        "tuning_seeds": list(study.seeds),
        "test_seeds": list(sweep.test_seeds),
        "incumbents": (read(folder) or {}).get("incumbents", []),
        "results": results(study, folder, trials),
        "line": list(line),
        "environment": {"python": platform.python_version(), "platform": platform.platform()},
    }
