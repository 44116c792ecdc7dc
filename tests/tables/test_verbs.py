"""The verbs on results, from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Cli
from tests.tables.conftest import WriteRun

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", ["table", "diff", "report", "plot"])
def test_every_verb_has_a_page(cli: Cli, verb: str) -> None:
    assert f"\n  {verb} " in cli("--help").stdout
    assert f"peft-train {verb}" in cli(verb, "--help").stdout


def test_a_table_on_the_screen_and_in_a_file(write_run: WriteRun, tmp_path: Path, cli: Cli) -> None:
    for seed in (0, 1):
        write_run(f"runs/{seed}", 0.9, seed=seed, **{"optimizer.lr": 1e-3})
    shown = cli("table", "runs").stdout
    assert "lora" in shown
    assert "90.0 \u00b1 0.0" in shown
    assert cli("table", "runs", "--output", "t.json", "--show", "method,accuracy").stdout == ""
    (row,) = json.loads(Path("t.json").read_text())["rows"]
    assert row["method"] == "lora"
    assert row["accuracy"]["seeds"] == 2


def test_what_cannot_be_done_is_one_message(write_run: WriteRun, cli: Cli) -> None:
    write_run("runs/a", 0.9)
    for words, said in (
        (["table"], "RUNS"),
        (["table", "nowhere"], "nowhere: no such folder"),
        (["table", "runs", "--tuning-seeds", "x"], "'x' is not whole numbers between commas"),
        (["table", "runs", "--output", "t.doc"], "its ending is none of"),
        (["table", "runs", "--show", "acc"], "--show acc: no such column"),
        (["report", "runs"], "--output"),
    ):
        assert said in cli(*words, code=2).stderr


def test_tables_need_no_torch(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", 0.9)
    code = (
        "import sys; from peftcli.cli import main; "
        f"code = main(['table', {str(tmp_path / 'runs')!r}]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
