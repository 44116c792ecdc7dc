"""`-m` as a user meets it: real runs on a tiny model, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from peftcli.sweep.ledger import Ledger, Member
from tests.conftest import Cli, environment

ROOT = Path(__file__).parents[2]


@pytest.fixture
def words(tiny_run: list[str]) -> list[str]:
    """A short run's words without its folder."""
    return [*(w for w in tiny_run if not w.startswith("run_dir=")), "trainer.max_steps=1"]


def sweeping(words: list[str], cache: Path, folder: Path) -> subprocess.Popen[str]:
    """A sweep in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "peftcli", "-m", *words],
        env={**environment(cache), "PYTHONPATH": str(ROOT)},
        cwd=folder,
        stderr=subprocess.PIPE,
        text=True,
    )


def members(folder: Path) -> dict[str, Member]:
    return {m.title: m for m in Ledger(folder).members()}


def test_members_fail_by_themselves_and_only_what_is_missing_is_run_again(
    words: list[str], cache: Path, cli: Cli, tmp_path: Path
) -> None:
    line = [*words, "method.r=2,0", "dataset.eval_samples=6,600", "sweep.jobs=2"]
    driver = sweeping(line, cache, tmp_path)
    _, shown = driver.communicate(timeout=240)
    assert driver.returncode == 1, shown
    (folder,) = (tmp_path / "multirun" / "lora_llama_chat").iterdir()
    found = members(folder)
    good, bad, impossible, _ = found.values()
    assert good.title == "method.r=2 dataset.eval_samples=6"
    assert (good.state, good.exit_code, good.attempts) == ("done", 0, 1)
    assert (bad.state, bad.exit_code, bad.attempts) == ("failed", 3, 1)
    assert "dataset.eval_samples: 600" in (bad.reason or "")
    assert (impossible.state, impossible.exit_code, impossible.attempts) == ("failed", 2, 0)
    assert "method.r=0" in (impossible.reason or "")
    assert "1 of 4 members done, 3 failed" in shown
    assert shown.count("dataset.eval_samples: 600") == 2  # at once, and at the end
    assert "Traceback" not in shown

    run_dir = Ledger(folder).run_dir(good.id)
    cfg = OmegaConf.load(run_dir / "config.yaml")
    assert (cfg.method.r, "sweep" in cfg) == (2, False)
    assert (run_dir / "output.log").read_text().count("held-out results") == 1
    assert "600" in (Ledger(folder).run_dir(bad.id) / "output.log").read_text()
    info = json.loads((run_dir / "result.json").read_text())["run_info"]
    assert (good.seconds or 0) - info["total_time"] < 3

    again = cli("-m", *line, code=1).stderr
    assert "going on with the same line's sweep" in again
    assert members(folder) == found
    listed = cli("-m", *line, "--dry-run").stderr
    assert "1 of 4 members done, 0 left" in listed
    assert members(folder) == found
    cli("-m", *line, "--retry-failed", code=1)
    assert members(folder)[bad.title].attempts == 2
    assert members(folder)[good.title] == good


def test_a_signal_stops_the_member_and_the_same_line_goes_on(
    words: list[str], cache: Path, tmp_path: Path
) -> None:
    line = [*words, "trainer.max_steps=2000", "seed=0,1"]
    driver = sweeping([*line, "sweep_dir=sweep"], cache, tmp_path)
    deadline = time.monotonic() + 120
    steps = 0
    while steps < 5:
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
        steps = sum(p.read_text().count("\n") for p in tmp_path.glob("sweep/members/*/metrics*"))
    os.kill(driver.pid, signal.SIGTERM)
    _, shown = driver.communicate(timeout=60)
    assert driver.returncode == 75, shown
    first, second = Ledger(tmp_path / "sweep").members()
    assert (first.state, first.exit_code, second.state) == ("stopped", 75, "waiting")
    assert list(Ledger(tmp_path / "sweep").run_dir(first.id).glob("checkpoints/step-*"))
    assert "the same line goes on" in shown


def test_a_stopped_run_goes_on_by_its_folder(cli: Cli, tiny_run: list[str], tmp_path: Path) -> None:
    cli(*tiny_run)
    done = cli("train", "run")
    assert "finished" in done.stderr
