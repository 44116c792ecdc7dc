"""Whole runs of several processes, from the command line."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftcli.cli import main
from tests.conftest import Cli, environment
from tests.dist.conftest import fork, free_port

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
DEEPSPEED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE")  # and a word of its own


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def steps(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def when_it_trains(folder: Path, act: Callable[[], None]) -> threading.Thread:
    """Act once the first step is in the metrics."""

    def watch() -> None:
        log = folder / "metrics.jsonl"
        wait_for(lambda: log.exists() and any("loss" in s for s in steps(folder)))
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and not condition():
        time.sleep(0.02)


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


@pytest.fixture
def two(tiny_run: list[str]) -> list[str]:
    """Words of the tiny run as two processes."""
    one = [word for word in tiny_run if "batch_size" not in word]
    return [*one, "strategy=ddp", "trainer.per_device_train_batch_size=2", "launch.num_processes=2"]


def test_two_processes_leave_what_one_leaves(
    cli: Cli, tiny_run: list[str], two: list[str], tmp_path: Path
) -> None:
    plain = "trainer.bf16=false"
    cli(*tiny_run, plain, f"run_dir={tmp_path / 'one'}")
    done = cli(*two, plain, f"run_dir={tmp_path / 'two'}")
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


def test_a_rank_that_is_killed_is_named_and_all_start_again_from_the_newest_checkpoint(
    cli: Cli, two: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    died: list[int] = []

    def kill() -> None:
        os.kill(pid_of(1), signal.SIGKILL)
        died.append(steps(folder)[-1]["step"])

    def kill_twice() -> None:
        kill()
        wait_for(lambda: steps(folder)[-1]["step"] > died[0] + 3)
        kill()

    thread = when_it_trains(folder, kill_twice)
    often = ["trainer.max_steps=2000", "trainer.save_steps=1", "trainer.eval_on_start=false"]
    done = cli(*two, "strategy=fsdp", *often, "launch.max_restarts=1", "resume=never", code=1)
    thread.join()
    assert done.stderr.count("rank 1 was killed by SIGKILL") == 2
    assert done.stderr.count("starting again (1 of launch.max_restarts left)") == 1
    assert done.stderr.count("error:") == 1
    assert [s["step"] for s in steps(folder)] == list(range(1, steps(folder)[-1]["step"] + 1))


@pytest.mark.parametrize(
    "names", [TORCHRUN, SLURM, DEEPSPEED], ids=["torchrun", "srun", "deepspeed"]
)
def test_processes_of_another_launcher_join_instead_of_starting_more(
    names: tuple[str, ...],
    two: list[str],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    port = free_port()

    def be_rank(rank: int) -> None:
        number, local, *sizes = names
        values = {number: rank, local: rank, **dict.fromkeys(sizes, 2)}
        os.environ |= {name: str(n) for name, n in values.items()}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), **environment(cache)}
        words = [word for word in two if "num_processes" not in word]
        own = [f"--local_rank={rank}", "train"] if names == DEEPSPEED else []
        assert main([*own, *words]) == 0

    monkeypatch.chdir(tmp_path)
    fork(2, be_rank, tmp_path)
    assert result(tmp_path / "run")["meta_info"]["ranks"] == 2
    assert "num_processes: 2" in (tmp_path / "run" / "config.yaml").read_text()


def test_two_nodes_meet_and_one_of_them_writes_the_model_that_they_had_cut_up(
    cli: Cli, tiny_run: list[str], two: list[str], cache: Path, tmp_path: Path
) -> None:
    alone, words = (
        [*(word for word in given if not word.startswith("method.")), "method=full"]
        for given in (tiny_run, two)
    )
    nodes = ["launch.num_processes=1", "launch.nnodes=2", "strategy=fsdp"]
    meeting = f"launch.rdzv_endpoint=localhost:{free_port()}"

    def be_node(number: int) -> None:
        os.environ |= environment(cache)
        folder = f"run_dir={tmp_path / f'run-{number}'}"
        assert main([*words, *nodes, meeting, f"launch.node_rank={number}", folder]) == 0

    cli(*alone, f"run_dir={tmp_path / 'alone'}")
    fork(2, be_node, tmp_path)
    assert result(tmp_path / "run-0")["meta_info"]["ranks"] == 2
    assert not (tmp_path / "run-1" / "metrics.jsonl").exists()
    weights, wanted = (
        load_file(tmp_path / name / "adapter" / "model.safetensors") for name in ("run-0", "alone")
    )
    torch.testing.assert_close(weights, wanted, atol=1e-4, rtol=1e-3)


# -- refused before anything is loaded or started --------------------------------------------------
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategy=fsdp", "quantization=nf4"], "strategy=fsdp: cannot cut up"),
        (
            ["strategy=fsdp", "method=full", "optimizer=adafactor"],
            "looks at whole matrices",
        ),
        (["strategy=deepspeed", "quantization=int8"], "strategy.zero_stage=3: cannot cut up"),
        (
            ["strategy=deepspeed", "strategy.zero_stage=2", "strategy.offload=parameters"],
            "every process has all weights",
        ),
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
