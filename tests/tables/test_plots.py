"""Figures, and the points that they and the report show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from peftcli.tables.render import Cell, Column, Table
from peftcli.tables.runs import read_runs
from peftcli.tables.series import points, sensitivity, thinned
from peftcli.tables.table import Asked, plan_of
from tests.tables.conftest import WriteRun

if TYPE_CHECKING:
    from tests.conftest import Cli


def test_the_front_holds_what_nothing_beats(tmp_path: Path) -> None:
    rows = (("a", 10, 0.5), ("b", 20, 0.9), ("c", 15, 0.4), ("d", 30, 0.9), ("e", 40, None))
    table = Table(
        "t",
        (Column("m", "m"), Column("p", "num_trainable_params"), Column("accuracy", "accuracy")),
        tuple((Cell(n, n), Cell("", cost), Cell("", score)) for n, cost, score in rows),
    )
    found = points(table, "accuracy", "num_trainable_params")
    assert [(p.label, p.on_front) for p in found] == [
        ("a", True),
        ("c", False),
        ("b", True),
        ("d", False),
    ]


def test_rates_are_means_over_the_seeds_that_chose(write_run: WriteRun, tmp_path: Path) -> None:
    for lr, seed, value in ((0.1, 100, 0.5), (0.01, 100, 0.6), (0.01, 101, 0.8), (0.01, 0, 0.1)):
        write_run(f"runs/{lr}-{seed}", value, seed=seed, **{"optimizer.lr": lr})
    runs = read_runs([tmp_path / "runs"])
    found = sensitivity(runs, plan_of(runs, Asked(tuning_seeds=(100, 101))))
    assert found == {"lora": [(0.01, pytest.approx(0.7)), (0.1, 0.5)]}


def test_thinning_keeps_both_ends() -> None:
    curve = [(i, float(i)) for i in range(1000)]
    assert thinned(curve, 3) == [(0, 0.0), (500, 500.0), (999, 999.0)]
    assert thinned(curve[:2], 3) == curve[:2]


def test_figures_are_written_in_both_formats(write_run: WriteRun, tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    for lr, value in ((0.1, 0.5), (0.01, 0.6)):
        write_run(f"runs/{lr}", value, losses=(1.0, 0.5), **{"optimizer.lr": lr})
    cli("plot", tmp_path / "runs", "--output", "figures")
    names = {path.name for path in Path("figures").iterdir()}
    stems = ("loss", "optimizer.lr", "accuracy_parameters", "accuracy_memory", "accuracy_time")
    assert names == {f"{stem}.{ending}" for stem in stems for ending in ("png", "svg")}
    assert (Path("figures") / "loss.svg").read_text().startswith("<?xml")


def test_without_matplotlib_the_extra_is_named(
    write_run: WriteRun,
    tmp_path: Path,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_run("runs/a", 0.5, losses=(1.0, 0.5))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert (
        "pip install 'peftcli[plots]'"
        in cli("plot", tmp_path / "runs", "--output", "figures", code=2).stderr
    )
