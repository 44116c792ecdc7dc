"""The first cause of a run's end, among what its ranks wrote down."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftcli.cli import ended_by, main
from peftcli.dist import causes
from peftcli.errors import Stopped


@pytest.fixture
def as_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process is rank 1 of a run; where its launcher looks for causes."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(causes.FOLDER, str(tmp_path))
    monkeypatch.setenv(causes.TORCHRUN, str(tmp_path / "error.json"))
    return tmp_path


def write(folder: Path, rank: int, text: str, exit_code: int, time: float) -> None:
    cause = {"rank": rank, "text": text, "exit_code": exit_code, "time": time}
    (folder / f"cause-{rank}.json").write_text(json.dumps(cause))


def test_a_rank_leaves_its_message_to_the_launcher(
    as_rank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rank"]) == 2
    assert capsys.readouterr().err == ""
    cause = causes.first(as_rank, {1: 2})
    assert (cause.rank, cause.exit_code) == (1, 2)
    assert "one file" in cause.text
    assert json.loads((as_rank / "error.json").read_text())["message"] == cause.text


def test_without_a_launcher_of_ours_a_rank_says_it_itself(
    as_rank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(causes.FOLDER)
    assert main(["rank"]) == 2
    assert "one file" in capsys.readouterr().err
    assert (as_rank / "error.json").exists()


def test_of_ranks_that_were_stopped_together_rank_0_alone_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert ended_by(Stopped("saved")) == 75
        said.append(capsys.readouterr().err)
    assert said == ["error: saved\n", ""]


def test_the_earliest_cause_is_the_first(tmp_path: Path) -> None:
    write(tmp_path, 0, "the other rank has gone", 1, 20.5)
    write(tmp_path, 1, "the data are broken", 3, 20.25)
    assert causes.first(tmp_path, {0: 1, 1: 3}).text == "the data are broken"
    assert causes.first(tmp_path, {0: 1}).exit_code == 3


def test_a_rank_that_a_signal_killed_comes_before_what_the_others_met(tmp_path: Path) -> None:
    write(tmp_path, 0, "the other rank has gone", 1, 20.5)
    cause = causes.first(tmp_path, {0: 1, 1: -9})
    assert (cause.rank, cause.exit_code) == (1, 1)
    assert "killed by SIGKILL" in cause.text
    assert "fsdp" in cause.text


def test_a_rank_without_a_word_is_named(tmp_path: Path) -> None:
    cause = causes.first(tmp_path, {1: 7})
    assert (cause.exit_code, "rank 1" in cause.text) == (7, True)
