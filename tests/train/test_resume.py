"""Interrupted runs continue bit for bit; checkpoints are whole or are not there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from peftcli import interrupts
from peftcli.errors import DataError, NonFinite, Stopped
from peftcli.train import checkpoint
from tests.train.conftest import OPTIONS, MakeLoop, interrupted, loops


def outcome(loop: object) -> tuple[dict[str, torch.Tensor], list[dict], list[bytes]]:
    """(trained tensors, metrics without the clock, optimizer file) of a finished loop."""
    trained = {n: p.detach().clone() for n, p in loop.host.trained().items()}
    lines = [json.loads(line) for line in loop.folder.metrics.read_text().splitlines()]
    for line in lines:
        line.pop("wall", None)
    last = loop.folder.checkpoints / f"step-{loop.progress.step:06d}"
    return (
        trained,
        lines,
        [(last / f).read_bytes() for f in ("trained.safetensors", "optimizer.safetensors")],
    )


def same(a: tuple, b: tuple) -> None:
    assert a[1] == b[1]
    assert all(torch.equal(a[0][n], b[0][n]) for n in a[0])
    assert a[2] == b[2]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """What the run of `OPTIONS` comes to without a stop."""
    torch.set_num_threads(1)
    with loops(tmp_path_factory.mktemp("straight")) as make_loop:
        loop = make_loop(**OPTIONS)
        loop.fit()
        return outcome(loop)


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    make_loop: MakeLoop, straight: tuple, tmp_path: Path, number: int
) -> None:
    same(outcome(interrupted(make_loop, tmp_path / "again", [4], number)), straight)


def test_a_run_whose_time_is_over_saves_and_goes_on_bit_for_bit(
    make_loop: MakeLoop, straight: tuple, tmp_path: Path
) -> None:
    loop = make_loop(folder=tmp_path / "again", **OPTIONS)
    loop.stopper.until = time.monotonic() + 0.05
    loop.stopper.begin(loop.ranks)
    with pytest.raises(Stopped, match=r"^stopped by trainer\.stop_after after step \d"):
        loop.fit()
    loop.stopper.received = None
    same(outcome(interrupted(make_loop, tmp_path / "again", [])), straight)


@pytest.mark.parametrize("at", [[0, 1, 2], [2, 5, 8], [4, 9], [9, 10]], ids=str)
def test_several_interruptions_leave_no_trace(
    make_loop: MakeLoop, straight: tuple, tmp_path: Path, at: list[int]
) -> None:
    same(outcome(interrupted(make_loop, tmp_path / "again", list(at))), straight)


def test_a_signal_in_any_micro_batch_leaves_no_trace(make_loop: MakeLoop, tmp_path: Path) -> None:
    """Four steps of three forward and backward passes each; a step that has begun is finished."""
    options = {"dropout": 0.2, "per_device_train_batch_size": 2, "max_steps": 4}
    options |= {"gradient_accumulation_steps": 3, "longest_first": False}
    straight = make_loop(folder=tmp_path / "straight", **options)
    straight.fit()
    for number in range(9):
        folder = tmp_path / str(number)
        stopped, passes = make_loop(folder=folder, **options), iter(range(number))

        def signalled(*_: object, passes: Iterator[int] = passes) -> None:
            if next(passes, None) is None and stopped.stopper.received is None:  # noqa: B023
                os.kill(os.getpid(), signal.SIGTERM)

        stopped.host.model.register_forward_hook(signalled)
        with pytest.raises(Stopped, match=f"after step {number // 3 + 1} of 4"):
            stopped.fit()
        stopped.stopper.received = None
        same(outcome(interrupted(make_loop, folder, [], **options)), outcome(straight))


def test_a_signal_during_evaluation_is_obeyed(
    make_loop: MakeLoop, straight: tuple, tmp_path: Path
) -> None:
    loop = make_loop(folder=tmp_path / "again", **OPTIONS)
    plain = loop.evaluate
    assert plain is not None

    def evaluate():
        if loop.progress.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            loop.stopper.poll()
        return plain()

    loop.evaluate = evaluate
    with pytest.raises(Stopped, match="after step 5 of 12"):
        loop.fit()
    loop.stopper.received = None
    same(outcome(interrupted(make_loop, tmp_path / "again", [])), straight)


def test_the_same_seed_gives_the_same_run_and_another_a_different_one(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        loop = make_loop(folder=tmp_path / name, seed=seed, dropout=0.1)
        loop.fit()
        results.append(outcome(loop))
    same(results[0], results[1])
    assert results[0][1] != results[2][1]


def test_the_rate_ends_where_the_schedule_ends(make_loop: MakeLoop) -> None:
    loop = make_loop(lr=0.03)
    loop.fit()
    rates = [r["lr"] for r in loop.screen.records]
    assert rates[0] == pytest.approx(0.03)
    assert rates[-1] == pytest.approx(0.03 / 12)
    assert loop.scheduler.get_last_lr()[0] == pytest.approx(0.0)


# -- damage ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with loops(tmp_path_factory.mktemp("saved")) as make_loop:
        loop = make_loop(save_steps=4, save_total_limit=3)
        loop.fit()
        return loop.folder.checkpoints


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """Three checkpoints, to be damaged."""
    return Path(shutil.copytree(saved_once, tmp_path / "checkpoints"))


def test_a_checkpoint_holds_only_what_trains(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == [
        "latest",
        "step-000004",
        "step-000008",
        "step-000012",
    ]
    assert (saved / "latest").read_text() == "step-000012\n"
    sizes = {p.name: p.stat().st_size for p in (saved / "step-000012").iterdir()}
    trained = 4 * 2 * 3 * (2 * (32 + 32) + 2 * (32 + 16) + 2 * (32 + 48) + (48 + 32))
    assert trained <= sizes["trained.safetensors"] <= 2 * trained + 20_000
    assert sum(sizes.values()) < 4 * trained + 80_000


@pytest.mark.parametrize(
    "name", ["trained.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"]
)
@pytest.mark.parametrize("damage", ["cut", "emptied", "flipped", "removed"])
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(
    saved: Path, name: str, damage: str
) -> None:
    file = saved / "step-000012" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    changed = {"cut": file.read_bytes()[:-1], "emptied": b"", "flipped": bytes(content)}
    file.unlink() if damage == "removed" else file.write_bytes(changed[damage])
    found, skipped = checkpoint.newest(saved)
    assert found.name == "step-000008"
    assert len(skipped) == 1
    assert name in skipped[0]


def test_without_its_manifest_it_is_no_checkpoint(saved: Path) -> None:
    (saved / "step-000012" / "manifest.json").unlink()
    assert checkpoint.newest(saved)[0].name == "step-000008"


def test_when_none_can_be_trusted_the_run_does_not_start_from_scratch(saved: Path) -> None:
    for manifest in saved.glob("*/manifest.json"):
        manifest.write_text("{}")
    with pytest.raises(DataError, match="resume=never"):
        checkpoint.newest(saved)


def test_a_folder_that_cannot_be_written_is_one_message(
    make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = make_loop()
    loop.folder.checkpoints.parent.mkdir(parents=True, exist_ok=True)
    loop.folder.checkpoints.write_text("a file where the folder should be")
    with pytest.raises(DataError, match="cannot write the checkpoint"):
        loop.save()


# -- numbers that are not finite -------------------------------------------------------------------
def poison(loop: object, steps: set[int]) -> None:
    plain = loop.method.__class__.penalty

    class Poisoned(type(loop.method)):
        def penalty(self, host):
            bad = loop.progress.step in steps
            return (
                next(iter(host.trained().values())).sum() * float("nan")
                if bad
                else plain(self, host)
            )

    object.__setattr__(loop.method, "__class__", Poisoned)


def test_a_step_with_numbers_that_are_not_finite_is_not_taken(make_loop: MakeLoop) -> None:
    loop = make_loop(max_steps=6)
    poison(loop, {2})
    loop.fit()
    assert all(torch.isfinite(p).all() for p in loop.host.trained().values())
    assert len(loop.screen.notes) == 1
    record = json.loads((loop.folder.path / "nonfinite-000002.json").read_text())
    assert len(record["examples"]) == 4


def test_three_such_steps_in_a_row_stop_the_run_with_the_weights_intact(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(max_steps=9)
    poison(loop, {3, 4, 5, 6, 7})
    with pytest.raises(NonFinite, match="3 steps in a row"):
        loop.fit()
    assert loop.progress.step == 5
    assert all(torch.isfinite(p).all() for p in loop.host.trained().values())
