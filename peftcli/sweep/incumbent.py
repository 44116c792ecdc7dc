"""From tuning to testing: the best settings are frozen in `incumbent.yaml`, and what is run on the
test seeds is read from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peftcli import __version__
from peftcli.disk import write_whole
from peftcli.errors import ConfigError, DataError
from peftcli.sweep.ledger import Trial
from peftcli.sweep.protocol import Cell, Study
from peftcli.sweep.results import Results
from peftcli.sweep.space import Point

FILE = "incumbent.yaml"


def propose(study: Study, folder: Path, trials: Sequence[Trial]) -> list[Point]:
    """The runs to plan next, each as its overrides; nothing where all there is still runs, or where
    the sweep is over. To be called by one process at a time: it freezes the incumbents. A cell that
    has none, since its runs failed, gets one when they are run again.

    Raises:
        ConfigError: budgets were not equal, or the folder's incumbents were tuned otherwise.
    """
    frozen = frozen_for(study, folder)
    chosen = list(frozen["incumbents"]) if frozen else []
    without = [cell for cell in study.cells if cell.name not in {i["cell"] for i in chosen}]
    if without:
        found = study.tuned(trials)
        wanted = study.to_tune(found)
        still = any(results.pending for results in found)
        if wanted or still or not study.is_reported:
            return wanted
        study.require_equal_budgets(found)
        if new := choose(study, without, found, trials):
            chosen += new
            write(folder, record(study, chosen))
    return study.to_test([i["overrides"] for i in chosen], trials)


def frozen_for(study: Study, folder: Path) -> dict[str, Any] | None:
    """The frozen settings of this study; None before they are.

    Raises:
        ConfigError: they were tuned otherwise.
    """
    frozen = read(folder)
    if frozen is not None and frozen["digest"] != study.digest:
        raise ConfigError(
            f"{folder / FILE}: was frozen for another space, budget or other seeds, and has been "
            "tested. Change them in another sweep_dir."
        )
    return frozen


def choose(
    study: Study, cells: Sequence[Cell], found: Sequence[Results], trials: Sequence[Trial]
) -> list[dict[str, Any]]:
    """The best setting of each of these cells (of several metrics, its Pareto front), as far as
    they have one, and all that chose it.
    """
    goal = study.objective(trials)
    incumbents = []
    for cell, results in zip(study.cells, found, strict=True):
        for point in results.best if cell in cells else ():
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
    return incumbents


def record(study: Study, incumbents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What `incumbent.yaml` holds."""
    return {
        "digest": study.digest,
        "peftcli": __version__,
        "space": study.space.digest(),
        "budget": study.budget,
        "incumbents": list(incumbents),
    }


def read(folder: Path) -> dict[str, Any] | None:
    """The frozen settings of a sweep; None before they are.

    Raises:
        DataError: the file is broken.
    """
    path = folder / FILE
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as e:
        raise DataError(f"{path}: cannot be read ({e}).") from None
    if not isinstance(found, dict) or not {"digest", "incumbents"} <= found.keys():
        raise DataError(f"{path}: holds no incumbents. Take it away to have them chosen again.")
    return found


def write(folder: Path, frozen: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    head = "# The best settings, frozen before any run on the test seeds.\n"
    write_whole(folder / FILE, head + yaml.safe_dump(dict(frozen), sort_keys=False))
