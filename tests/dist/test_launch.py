"""Whole runs of several processes, from the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftcli.cli import main
from tests.conftest import Cli, environment
from tests.dist.conftest import fork


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def when_it_trains(folder: Path, act: Callable[[], None]) -> threading.Thread:
    """Act once the first step is in the metrics."""

    def watch() -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            if (folder / "metrics.jsonl").exists() and any("loss" in s for s in steps(folder)):
                return act()
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def pid_of(rank: int) -> int:
    """The process of a rank that this process has started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == os.getpid() and f"RANK={rank}\0" in (path / "environ").read_text():
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"rank {rank} does not run")


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


@pytest.fixture
def two(tiny_run: list[str]) -> list[str]:
    """Words of the tiny run as two processes."""
    one = [word for word in tiny_run if "batch_size" not in word]
    return [*one, "strategy=ddp", "trainer.per_device_train_batch_size=2", "launch.num_processes=2"]


def test_two_processes_leave_what_one_leaves(
    cli: Cli, tiny_run: list[str], two: list[str], tmp_path: Path
) -> None:
    cli(*tiny_run, f"run_dir={tmp_path / 'one'}")
    done = cli(*two, f"run_dir={tmp_path / 'two'}")
    assert (done.stdout, done.stderr) == ("", "")  # ranks write for themselves
    one, found = result(tmp_path / "one"), result(tmp_path / "two")
    assert (one["meta_info"]["ranks"], found["meta_info"]["ranks"]) == (1, 2)
    for key in ("state_before_sha256", "sites", "matched"):
        assert one["meta_info"][key] == found["meta_info"][key]
    pairs = zip(steps(tmp_path / "one"), steps(tmp_path / "two"), strict=True)
    for alone, together in pairs:
        for key in ("loss", "eval_loss", "targets", "lr"):
            assert together.get(key) == pytest.approx(alone.get(key), abs=1e-5)
    files = [
        {str(p.relative_to(f)) for p in f.rglob("*")} for f in (tmp_path / "one", tmp_path / "two")
    ]
    assert files[0] == files[1]
    measured = json.loads(cli("eval", tmp_path / "two", "--json").stdout)["metrics"]
    assert measured["loss"] == pytest.approx(steps(tmp_path / "two")[-1]["eval_loss"], abs=1e-5)


def test_a_signal_to_the_launcher_stops_the_run_and_one_process_ends_it(
    cli: Cli, tiny_run: list[str], two: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    thread = when_it_trains(folder, lambda: os.kill(os.getpid(), signal.SIGTERM))
    done = cli(*two, "trainer.max_steps=2000", code=75)
    thread.join()
    assert "stopped by SIGTERM after step" in done.stderr
    saved = [int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-*")]
    assert [s["step"] for s in steps(folder)][-1] == saved[0]
    assert len(saved) == 1
    total = f"trainer.max_steps={saved[0] + 2}"
    cli(folder, "strategy=single", total, code=2)  # two ranks had twice the examples
    checkpoint = f"resume={folder}/checkpoints/step-{saved[0]:06d}"
    cli(folder, "strategy=single", total, "trainer.per_device_train_batch_size=4", checkpoint)
    assert steps(folder)[-1]["step"] == saved[0] + 2


def test_a_rank_that_is_killed_ends_the_others_and_is_named(
    cli: Cli, two: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    thread = when_it_trains(folder, lambda: os.kill(pid_of(1), signal.SIGKILL))
    done = cli(*two, "strategy=fsdp", "trainer.max_steps=2000", code=1)
    thread.join()
    assert "rank 1 was killed by SIGKILL" in done.stderr
    assert done.stderr.count("error:") == 1


def test_processes_of_another_launcher_join_instead_of_starting_more(
    two: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()

    def be_rank(rank: int) -> None:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ |= {name: str(n) for name, n in names.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), **environment(cache)}
        assert main([word for word in two if "num_processes" not in word]) == 0

    monkeypatch.chdir(tmp_path)
    fork(2, be_rank, tmp_path)
    assert result(tmp_path / "run")["meta_info"]["ranks"] == 2
    assert "num_processes: 2" in (tmp_path / "run" / "config.yaml").read_text()


def test_two_nodes_meet_and_one_of_them_writes(
    two: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = ["launch.num_processes=1", "launch.nnodes=2", "strategy=fsdp"]
    meeting = f"launch.rdzv_endpoint=localhost:{free_port()}"

    def be_node(number: int) -> None:
        os.environ |= environment(cache)
        folder = f"run_dir={tmp_path / f'run-{number}'}"
        words = [*two, *nodes, meeting, f"launch.node_rank={number}", folder]
        assert main(words) == 0

    monkeypatch.chdir(tmp_path)
    fork(2, be_node, tmp_path)
    assert result(tmp_path / "run-0")["meta_info"]["ranks"] == 2
    assert not (tmp_path / "run-1" / "metrics.jsonl").exists()


# -- refused before anything is loaded or started --------------------------------------------------
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategy=fsdp", "quantization=nf4"], "strategy=fsdp: cannot cut up"),
        (["strategy=fsdp", "method=full"], "Full leaves none. Use strategy=ddp"),
    ],
    ids=str,
)
def test_check_refuses_what_a_strategy_cannot_do(
    words: list[str], said: str, cli: Cli, tiny_run: list[str]
) -> None:
    one = [word for word in tiny_run if not word.startswith("method.r=")]
    assert said in cli("check", *one, *words, code=2).stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launch.nnodes=2"], "meet at HOST:PORT of node 0"),
        (["launch.nnodes=2", "launch.rdzv_endpoint=here:1", "launch.node_rank=2"], "are 0 to 1"),
        (["launch.num_processes=0"], "takes auto | a whole number >= 1"),
    ],
    ids=str,
)
def test_nodes_that_cannot_meet_are_refused(
    words: list[str], said: str, cli: Cli, two: list[str]
) -> None:
    assert said in cli(*two, *words, code=2).stderr


def test_processes_of_a_launcher_are_refused_in_a_run_of_one(
    cli: Cli, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "strategy=single: 2 processes were started" in cli(*tiny_run, code=2).stderr
