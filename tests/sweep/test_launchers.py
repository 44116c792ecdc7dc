"""Other engines start workers, which divide a sweep among themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import ConfigError
from peftcli.sweep import launchers
from peftcli.sweep.ledger import Ledger
from tests.conftest import Cli
from tests.sweep import quick

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "options"), [("joblib", {}), ("submitit", {"cluster": "local", "timeout_min": 2})]
)
def test_workers_of_a_launcher_do_each_member_once(
    name: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.chdir(ROOT)
    ledger = quick.planned(tmp_path / "s", [f"m{i}=0.1" for i in range(6)])
    command = [sys.executable, "-m", "tests.sweep.quick", str(ledger.folder)]
    follower = launchers.Follower(ledger, None)
    workers = launchers.Workers(command, 2, options, ledger, tmp_path / "stop")
    assert launchers.LAUNCHERS[name](workers) == [0, 0]
    follower.look()
    for member in ledger.members():
        assert member.state == "done"
        assert len(quick.notes(ledger.run_dir(member.id), "done")) == 1


def test_workers_of_a_launcher_ask_a_search_for_members(
    cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("joblib", reason="joblib is not installed")
    words = [w for w in tiny_run if not w.startswith(("run_dir", "method.r"))]
    line = [*words, "trainer.max_steps=1", "trainer.eval_on_start=false", "method.r=2,4,8"]
    search = ["sweep.search=random", "sweep.trials=2", "sweep.launcher=joblib", "sweep.jobs=1"]
    shown = cli("-m", *line, *search, "sweep_dir=s").stderr
    assert "2 of 2 members done" in shown
    assert "(1 seed, best of 2)" in shown
    assert {m.state for m in Ledger(tmp_path / "s").members()} == {"done"}


def test_a_launcher_that_is_not_installed_names_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'peftcli\[nobody\]'"):
        launchers._import("nobody")
