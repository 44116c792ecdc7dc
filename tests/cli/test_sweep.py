"""`-m`: each run in a process of its own; a failure reaches no other; signals stop the sweep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

from tests.conftest import Cli, environment

ROOT = Path(__file__).parents[2]


def sweeping(words: list[str], cache: Path, folder: Path) -> subprocess.Popen[str]:
    """A sweep in a process of its own."""
    short = [word for word in words if not word.startswith("run_dir=")]
    return subprocess.Popen(
        [sys.executable, "-m", "peftcli", "-m", *short, f"hydra.sweep.dir={folder}"],
        env={**environment(cache), "PYTHONPATH": str(ROOT)},
        cwd=folder.parent,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_members_have_folders_and_configurations_and_a_failure_reaches_no_other(
    tiny_run: list[str], cache: Path, tmp_path: Path
) -> None:
    sweep = sweeping(
        [*tiny_run, "trainer.max_steps=1", "method.r=2,0,3"], cache, tmp_path / "sweep"
    )
    _, shown = sweep.communicate(timeout=120)
    assert sweep.returncode == 1, shown
    assert "2 of 3 runs done" in shown
    assert "sweep/1: configuration (exit code 2)" in shown
    assert "method.r=0" in shown
    assert "Traceback" not in shown
    for number, r in ((0, 2), (2, 3)):
        folder = tmp_path / "sweep" / str(number)
        cfg = OmegaConf.load(folder / "config.yaml")
        assert (cfg.method.r, cfg.run_dir) == (r, str(folder))
        assert (folder / "result.json").exists()
        assert (folder / ".hydra" / "overrides.yaml").exists()
    assert not (tmp_path / "sweep" / "1" / "result.json").exists()


def test_a_signal_reaches_the_running_member_once_and_ends_the_sweep(
    tiny_run: list[str], cache: Path, tmp_path: Path
) -> None:
    words = [*tiny_run, "trainer.max_steps=2000", "seed=0,1"]
    sweep = sweeping(words, cache, tmp_path / "sweep")
    metrics = tmp_path / "sweep" / "0" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert sweep.poll() is None, sweep.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(sweep.pid, signal.SIGTERM)
    _, shown = sweep.communicate(timeout=60)
    assert sweep.returncode == 75, shown
    assert "sweep/0: stopped" in shown
    assert list((tmp_path / "sweep" / "0" / "checkpoints").glob("step-*"))
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_stopped_run_goes_on_by_its_folder(cli: Cli, tiny_run: list[str], tmp_path: Path) -> None:
    cli(*tiny_run)
    done = cli("train", "run")
    assert "finished" in done.stderr
