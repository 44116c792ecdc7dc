"""What a kill, a full disk or a number that is not finite leaves behind, wherever it comes."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftcli.errors import DataError, NonFinite, Stopped
from peftcli.methods.lora import LoRA
from peftcli.train import checkpoint, optim
from peftcli.train.finite import not_finite
from peftcli.train.rotation import Keep, by_step, rotate
from peftcli.train.signals import Stopper
from tests.train.conftest import MakeLoop, chats

SMALL = LoRA(r=1, target_modules=("q",))


FILE_CALLS = {
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")
}


# -- killed ----------------------------------------------------------------------------------------
def in_a_child(work: Callable[[], Any]) -> int:
    """The wait status of a forked process that does `work`; exit code 99 where it raises."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(99)
    return os.waitpid(child, 0)[1]


def kill_at(count: int) -> None:
    """Have this process killed as it begins its `count`-th call that touches files."""
    calls = iter(range(count))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in FILE_CALLS and next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_kill_at_any_moment_of_a_save_leaves_the_one_before_or_the_new_one(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(method=SMALL, max_steps=3, save_steps=1, save_total_limit=1)
    loop.fit()
    folder = loop.folder.checkpoints
    loop.progress.step = 4
    count, found = 0, set()
    while True:

        def save(count: int = count) -> None:
            kill_at(count)
            loop.save()

        ended = in_a_child(save)
        killed = os.WIFSIGNALED(ended)
        assert killed or ended == 0
        newest, _ = checkpoint.newest(folder)
        assert newest is not None
        assert newest.name in ("step-000003", "step-000004")
        assert checkpoint.problem(newest) is None
        found.add(newest.name)
        shutil.rmtree(folder / "step-000004", ignore_errors=True)
        if not killed:
            break
        count += 2  # every other one, in half the time
    assert count > 25  # calls that a save consists of
    assert found == {"step-000003", "step-000004"}
    loop.progress.step = 5
    loop.save()
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-000005"]


def test_a_second_interrupt_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt_twice() -> None:
        with Stopper():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            os._exit(1)

    assert os.waitstatus_to_exitcode(in_a_child(interrupt_twice)) == Stopped.exit_code
    assert "the newest checkpoint is intact" in capfd.readouterr().err


def test_a_damaged_checkpoint_is_written_anew_when_the_run_comes_to_its_step_again(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(method=SMALL, max_steps=4, save_steps=2)
    loop.fit()
    last = loop.folder.checkpoints / "step-000004"
    os.truncate(last / "optimizer.safetensors", 100)
    again = make_loop(method=SMALL, max_steps=4, save_steps=2)
    newest, skipped = checkpoint.newest(loop.folder.checkpoints)
    assert "optimizer.safetensors has 100 bytes" in skipped[0]
    again.restore(newest)
    again.fit()
    assert checkpoint.problem(last) is None


def test_an_evaluation_that_is_done_again_is_logged_once(make_loop: MakeLoop) -> None:
    options = {"method": SMALL, "max_steps": 2, "held_out": chats(3, 9)}
    killed = make_loop(**options)
    killed.log = killed.open_log(killed.progress)
    killed._evaluate_if_due()  # and then the power goes
    loop = make_loop(**options)
    loop.fit()
    lines = [json.loads(line) for line in loop.folder.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2]


# -- rotation --------------------------------------------------------------------------------------
def folders(root: Path, *steps: int) -> Path:
    """Checkpoints of 100 bytes, the oldest written last."""
    for step in sorted(steps, reverse=True):
        (root / f"step-{step:06d}").mkdir(parents=True)
        (root / f"step-{step:06d}" / "trained.safetensors").write_bytes(bytes(100))
    return root


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Keep(2), [1000000, 30]),
        (Keep(1), [1000000]),
        (Keep(2, steps=frozenset([10])), [1000000, 30, 10]),
        (Keep(5, 250), [1000000, 30]),
        (Keep(5, 50), [1000000]),
        (Keep(5, 250, frozenset([10])), [1000000, 10]),
    ],
    ids=str,
)
def test_rotation_goes_by_step_and_keeps_the_newest_and_the_best(
    tmp_path: Path, keep: Keep, left: list[int]
) -> None:
    root = folders(tmp_path, 10, 20, 30, 1000000)
    rotate(root, 1000000, keep)
    assert [int(p.name[5:]) for p in by_step(root)] == left


def test_damaged_checkpoints_of_later_steps_are_not_counted_as_kept(tmp_path: Path) -> None:
    root = folders(tmp_path, 1, 2, 9)
    rotate(root, 2, Keep(2))
    assert [p.name for p in by_step(root)] == ["step-000002", "step-000001"]


# -- full disks ------------------------------------------------------------------------------------
@pytest.mark.parametrize("room", [0, 200, 2000, 8000])
def test_a_disk_that_fills_up_while_saving_leaves_what_was_there(
    make_loop: MakeLoop, room: int
) -> None:
    """The kernel refuses every write beyond `room` bytes of a file."""
    loop = make_loop(max_steps=2)
    loop.fit()
    before = sorted(loop.folder.checkpoints.rglob("*"))
    loop.progress.step = 3
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(DataError, match=r"cannot write the checkpoint .*intact"):
            loop.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(loop.folder.checkpoints.rglob("*")) == before
    assert checkpoint.newest(loop.folder.checkpoints)[0].name == "step-000002"
    loop.save()
    assert checkpoint.newest(loop.folder.checkpoints)[0].name == "step-000003"


# -- numbers that are not finite -------------------------------------------------------------------
def spoil_optimizer(loop: Any) -> None:
    next(iter(loop.optimizer.state.values()))["exp_avg"].view(-1)[0] = float("nan")


@pytest.mark.parametrize("failures", [2, 3])
def test_a_save_is_tried_again_where_a_disk_elsewhere_is_away_for_a_moment(
    failures: int, make_loop: MakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, left = make_loop(), [errno.EIO, errno.ESTALE, errno.EIO][:failures]
    sync = checkpoint.sync

    def away(path: Path) -> None:
        if left:
            raise OSError(left.pop(), "away", str(path))
        sync(path)

    monkeypatch.setattr(checkpoint, "sync", away)
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0))
    if failures > 2:
        with pytest.raises(DataError, match=r"cannot write the checkpoint .*: away"):
            loop.save()
    else:
        assert checkpoint.problem(loop.save()) is None
    assert not list(loop.folder.checkpoints.glob(".step*"))


def test_a_step_is_not_taken_on_an_optimizer_state_that_is_not_finite(make_loop: MakeLoop) -> None:
    loop = make_loop(max_steps=9, save_steps=4)
    plain = loop.step

    def step(examples: Any) -> float:
        if loop.progress.step == 4:
            spoil_optimizer(loop)
        return plain(examples)

    loop.step = step
    with pytest.raises(NonFinite, match="1 tensors of the optimizer's state"):
        loop.fit()
    assert loop.progress.step == 6
    assert not not_finite(loop.host.trained())
    record = json.loads((loop.folder.path / "nonfinite-000004.json").read_text())
    assert len(record["examples"]) == 4
    assert checkpoint.newest(loop.folder.checkpoints)[0].name == "step-000004"


def test_a_checkpoint_is_not_written_of_numbers_that_are_not_finite(make_loop: MakeLoop) -> None:
    loop = make_loop(max_steps=2)
    loop.fit()
    spoil_optimizer(loop)
    loop.progress.step = 3
    with pytest.raises(NonFinite, match=r"optimizer.*exp_avg"):
        loop.save()
    assert checkpoint.newest(loop.folder.checkpoints)[0].name == "step-000002"
    assert not list(loop.folder.checkpoints.glob(".step*"))


def test_weights_that_are_not_finite_stop_the_run_with_the_last_good_checkpoint(
    make_loop: MakeLoop,
) -> None:
    loop = make_loop(max_steps=9, save_steps=2, held_out=chats(3, 9))
    plain = loop.step

    def step(examples: Any) -> float:
        if loop.progress.step == 3:
            next(iter(loop.host.trained().values())).data.view(-1)[0] = float("inf")
        return plain(examples)

    loop.step = step
    with pytest.raises(NonFinite, match="weights are not finite before step 3"):
        loop.fit()
    assert checkpoint.newest(loop.folder.checkpoints)[0].name == "step-000002"


# -- rehearsals ------------------------------------------------------------------------------------
@pytest.mark.parametrize("option", ["rehearse", "longest_first"])
def test_a_rehearsal_leaves_no_trace_in_the_training(
    make_loop: MakeLoop, tmp_path: Path, option: str
) -> None:
    results = []
    for name in ("plain", "rehearsed"):
        asked = {"rehearse": False, "longest_first": False} | {option: name == "rehearsed"}
        loop = make_loop(
            folder=tmp_path / name, dropout=0.2, max_steps=3, held_out=chats(3, 9), **asked
        )
        loop.fit()
        random = torch.get_rng_state()
        results.append(([r["loss"] for r in loop.screen.records], loop.host.digest(), random))
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])


def test_a_run_fails_after_the_first_step_where_its_end_would_fail(make_loop: MakeLoop) -> None:
    loop = make_loop(max_steps=3)

    def publish(place: Path, values: dict[str, float]) -> None:
        place.mkdir()
        raise DataError("cannot be published")

    loop.publish = publish
    with pytest.raises(DataError, match="cannot be published"):
        loop.fit()
    assert loop.progress.step == 1
    assert not list(loop.folder.path.glob(".rehearsal"))


def test_the_longest_examples_are_computed_ahead_unless_the_first_step_has_them(
    make_loop: MakeLoop,
) -> None:
    for is_needed in (True, False):
        loop = make_loop(max_steps=2, per_device_train_batch_size=2)
        lengths = np.arange(len(loop.examples))
        loop.lengths = lengths if is_needed else np.ones_like(lengths)
        first = loop.plan.rows(loop.order(0), 0)
        computed: list[list[str]] = []
        plain = loop.shares

        def shares(examples: Any, plain: Any = plain, computed: list[list[str]] = computed) -> Any:
            computed.append([str(e["id"]) for e in examples])
            return plain(examples)

        loop.shares = shares
        loop.fit()
        assert len(computed) == 2 + is_needed
        assert (computed[0] != [str(loop.examples[i]["id"]) for i in first]) == is_needed


# -- what the optimizer keeps ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("cls", "kwargs", "per_number"),
    [("AdamW", {}, 8), ("SGD", {}, 0), ("SGD", {"momentum": 0.9}, 4), ("RMSprop", {}, 4)],
)
def test_bytes_of_the_optimizers_state_are_known_before_its_first_step(
    cls: str, kwargs: dict[str, Any], per_number: int
) -> None:
    for dtype, narrower in ((torch.float32, 1), (torch.bfloat16, 2)):
        weight = torch.nn.Parameter(torch.zeros(30, 70, dtype=dtype))
        optimizer = getattr(torch.optim, cls)([weight], lr=1e-3, **kwargs)
        assert optim.state_bytes(optimizer) == per_number * weight.numel() / narrower
        assert not optimizer.state
