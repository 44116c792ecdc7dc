"""Runs of several ranks stop together, and go on by however many ranks."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from peftcli import interrupts
from peftcli.data.collate import Batch, Example
from peftcli.dist import joining
from peftcli.dist.ranks import Ranks
from peftcli.errors import ConfigError, NonFinite, Stopped
from peftcli.train import checkpoint
from tests.dist.conftest import MakeLoop, Together, fork, free_port, needs_deepspeed, strategy
from tests.laws.test_method_laws import make_method
from tests.train.conftest import chats

BATCH = 4


def prepared(
    make_loop: MakeLoop, folder: Path, ranks: Ranks, name: str, method: str = "lora", **options: Any
) -> Any:
    """A loop that goes on from the newest checkpoint in the folder."""
    own = {} if method == "lora" else {"method": make_method(method)}
    loop = make_loop(
        chats(22),
        folder=folder,
        held_out=chats(7, 9),
        lr=1e-3,
        strategy=strategy(name, ranks),
        per_device_train_batch_size=BATCH // ranks.size,
        **{"max_steps": 8, "eval_steps": 3, **own, **options},
    )
    newest, skipped = checkpoint.newest(loop.folder.checkpoints)
    assert not skipped
    if newest is not None:
        loop.restore(newest)
    return loop


def watched(loop: Any) -> list[str]:
    """The examples of every step, as they come."""
    seen, plain = [], loop.step

    def step(examples: list[Example]) -> float:
        loss = plain(examples)
        seen.append(" ".join(str(e["id"]) for e in examples))
        return loss

    loop.step = step
    return seen


def stop_at(loop: Any, when: int, rank: int) -> None:
    """A signal comes to one rank in the middle of a step, which is then the last."""
    plain = loop.collate

    def collate(examples: Sequence[Example]) -> Batch:
        if (loop.progress.step, loop.ranks.rank) == (when, rank):
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(examples)

    loop.collate = collate
    with pytest.raises(Stopped, match=f"after step {when + 1} of") as stopped:
        loop.fit()
    assert stopped.value.exit_code == 75
    loop.stopper.received = None


def state_of(loop: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in loop.host.state().items()}


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


def layout(folder: Path) -> dict[str, Any]:
    """The tensors of a checkpoint's files, by name and shape."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as f:
            found[path.name] = {key: f.get_slice(key).get_shape() for key in f.keys()}
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_at_one_step_with_one_checkpoint(
    rank: int, make_loop: MakeLoop, together: Together, tmp_path: Path
) -> None:
    def work(ranks: Ranks) -> int:
        loop = prepared(make_loop, tmp_path / "run", ranks, "ddp")
        stop_at(loop, 2, rank)
        return loop.progress.step

    assert together(2, work) == [3, 3]
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [p.name for p in checkpoints.glob("step-*")] == ["step-000003"]


@pytest.mark.parametrize(
    ("before", "after", "method"),
    [
        (("single", 1), ("ddp", 2), "lora"),
        (("fsdp", 2), ("single", 1), "full"),
        (("ddp", 2), ("fsdp", 2), "lora"),
        (("zero2", 2), ("fsdp", 2), "full"),
        pytest.param(("single", 1), ("zero3", 2), "full", marks=needs_deepspeed),
        pytest.param(("zero3", 2), ("zero1", 2), "lora", marks=needs_deepspeed),
    ],
    ids=str,
)
def test_a_run_goes_on_by_another_number_of_ranks_or_strategy_in_the_same_order(
    before: tuple[str, int],
    after: tuple[str, int],
    method: str,
    make_loop: MakeLoop,
    together: Together,
    tmp_path: Path,
) -> None:
    straight = prepared(make_loop, tmp_path / "straight", Ranks(), "single", method)
    wanted = watched(straight)
    straight.fit()

    def first(ranks: Ranks) -> list[str]:
        loop = prepared(make_loop, tmp_path / "run", ranks, before[0], method)
        seen = watched(loop)
        stop_at(loop, 3, ranks.size - 1)
        return seen

    def second(ranks: Ranks) -> tuple[list[str], dict]:
        loop = prepared(make_loop, tmp_path / "run", ranks, after[0], method)
        seen = watched(loop)
        loop.fit()
        return seen, state_of(loop)

    seen = (together(2, first) if before[1] > 1 else [first(Ranks())])[0]
    found = together(2, second) if after[1] > 1 else [second(Ranks())]
    for more, state in found:
        assert seen + more == wanted
        torch.testing.assert_close(state, state_of(straight), atol=1e-4, rtol=1e-3)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), abs=1e-5)
    last = Path("checkpoints", "step-000008")
    assert layout(tmp_path / "run" / last) == layout(tmp_path / "straight" / last)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_stopped_ranks_end_bit_for_bit_as_if_nothing_had_happened(
    name: str, make_loop: MakeLoop, together: Together, tmp_path: Path
) -> None:
    options = {"dropout": 0.2, "gradient_accumulation_steps": 2, "max_steps": 5}

    def work(ranks: Ranks) -> tuple[dict, dict]:
        straight = prepared(make_loop, tmp_path / "straight", ranks, name, **options)
        straight.fit()
        for when in (1, 3):
            stop_at(prepared(make_loop, tmp_path / "run", ranks, name, **options), when, when % 2)
        again = prepared(make_loop, tmp_path / "run", ranks, name, **options)
        again.fit()
        return state_of(straight), state_of(again)

    for wanted, found in together(2, work):
        assert all(torch.equal(t, wanted[n]) for n, t in found.items())
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def test_numbers_that_are_not_finite_on_one_rank_stop_the_step_on_all(
    make_loop: MakeLoop, together: Together, tmp_path: Path
) -> None:
    def work(ranks: Ranks) -> dict[str, torch.Tensor]:
        loop = prepared(make_loop, tmp_path / "run", ranks, "ddp", max_steps=9)
        if ranks.rank == 1:
            poison(loop, {1, 4, 5, 6})
        with pytest.raises(NonFinite, match="3 steps in a row"):
            loop.fit()
        assert loop.progress.step == 6
        return state_of(loop)

    main, other = together(2, work)
    assert all(torch.equal(t, other[n]) and t.isfinite().all() for n, t in main.items())
    record = json.loads((tmp_path / "run" / "nonfinite-000001.json").read_text())
    assert len(record["examples"]) == BATCH


def poison(loop: Any, steps: set[int]) -> None:
    """A penalty that is not a number, in these steps."""

    class Poisoned(type(loop.method)):
        def penalty(self, host: Any) -> torch.Tensor | None:
            if loop.progress.step not in steps:
                return None
            return next(iter(host.trained().values())).sum() * float("nan")

    object.__setattr__(loop.method, "__class__", Poisoned)


def test_a_signal_to_a_rank_that_waits_for_others_ends_it(tmp_path: Path) -> None:
    port = free_port()

    def be_rank(number: int) -> None:
        interrupts.until_a_run_has_its_own()
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with interrupts.heard_in_waits():
            dist.init_process_group("gloo", rank=0, world_size=2)

    begun = time.monotonic()
    assert fork(1, be_rank, tmp_path) == [75]
    assert time.monotonic() - begun < 20


def test_ranks_do_not_look_for_a_node_of_an_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node1.invalid")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=node1\.invalid: .* is not known"):
        joining._refuse_unknown_host()
