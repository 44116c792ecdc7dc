"""A rank that no longer answers leaves where it stands."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from peftcli import config
from peftcli.dist import joining, stalls
from tests.conftest import environment
from tests.dist.conftest import fork
from tests.dist.test_launch import free_port

LIMIT = 2.0


def sleep_in_the_middle_of_a_step() -> None:
    time.sleep(2 * LIMIT)


def test_a_rank_that_hangs_leaves_its_stacks_and_the_others_say_where(
    tiny_run: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(cache).items():
        monkeypatch.setenv(name, value)
    cfg = config.compose([*tiny_run, "strategy=ddp"])
    run = config.typed(cfg)
    run = replace(run, launch=replace(run.launch, timeout=LIMIT))
    port = free_port()

    def be_rank(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        with joining.joined(run, cfg, torch.device("cpu")) as strategy:
            strategy.ranks.most(0)
            if rank == 1:
                sleep_in_the_middle_of_a_step()
                os._exit(0)
            with pytest.raises(RuntimeError) as lost:
                strategy.ranks.most(0)
            (tmp_path / "lost").write_text(joining._lost(lost.value, strategy.ranks, run))
            os._exit(0)

    fork(2, be_rank, tmp_path)
    folder = Path(run.run_dir)
    assert "sleep_in_the_middle_of_a_step" in (folder / stalls.name(1)).read_text()
    assert "most" in (folder / stalls.name(0)).read_text()
    assert f"{folder}/stacks-rank-*.txt" in (tmp_path / "lost").read_text()
    said = stalls.told(folder, [1], LIMIT)
    assert said == (
        f"rank 1 did not answer for launch.timeout=2 seconds; where rank 1 stood: "
        f"{folder}/stacks-rank-1.txt"
    )
    (folder / stalls.name(1)).write_text("")  # as where the system had stopped it
    assert "rank 1 left no stacks" in (stalls.told(folder, [1], LIMIT) or "")
    stalls.forget(folder)
    assert stalls.told(folder, [1], LIMIT) is None


def test_the_stacks_of_a_first_start_outlive_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first := tmp_path / stalls.name(3)).write_text("where it stood")
    for number, key in enumerate(stalls.RESTARTS, 1):
        monkeypatch.setenv(key, str(number))
        with pytest.raises(TimeoutError), stalls.Watch(tmp_path, 3, 0.1) as watch:
            time.sleep(0.2)
            raise TimeoutError
        assert watch.path != first
        said = stalls.told(tmp_path, [3], LIMIT) or ""
        assert str(watch.path) in said
        monkeypatch.delenv(key)
    assert first.read_text() == "where it stood"
    assert len(list(tmp_path.glob(stalls.ALL))) == 3
    stalls.forget(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_rank_that_goes_on_leaves_nothing(tmp_path: Path) -> None:
    with stalls.Watch(tmp_path, 3, 0.2) as watch:
        time.sleep(0.3)
        assert "test_stalls" in watch.path.read_text()
        watch.alive()
        assert watch.path.read_text() == ""
    assert not watch.path.exists()
