"""A search at work in a sweep folder, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftcli import cli
from peftcli.settings import Sweep
from peftcli.sweep.ledger import Ledger, Member
from peftcli.sweep.pruning import is_control
from peftcli.sweep.searching import Searching, searching
from peftcli.sweep.space import parse
from peftcli.train.folder import write_json
from tests.sweep import quick

SPACE = parse(["method=lora,dora", "method.r=1,2,4,8,16,32,64"])


def told(ledger: Ledger, member: Member, accuracies: list[float]) -> None:
    """Write what a run writes while it trains."""
    lines = [{"step": 10 * i, "eval_accuracy": a} for i, a in enumerate(accuracies)]
    path = ledger.run_dir(member.id) / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def done(ledger: Ledger, member: Member, accuracies: list[float]) -> None:
    """Write what a finished run leaves."""
    ledger.write(member, state="done", seconds=1.0)
    told(ledger, member, accuracies)
    result = {"metrics": {"after": {"accuracy": accuracies[-1]}}, "num_trainable_params": 8}
    write_json(ledger.run_dir(member.id) / "result.json", {"train_info": result})


def member(number: int, method: str, r: int, seed: int = 0) -> Member:
    words = (f"method={method}", f"method.r={r}", f"seed={seed}", "dataset.eval_part=tuning")
    return Member(f"{number:012x}", number, words)


@pytest.fixture
def at_work(tmp_path: Path) -> tuple[Searching, Ledger]:
    given = Sweep(prune="median", prune_after=3, tuning_seeds=(0,), test_seeds=(1, 2))
    ledger = Ledger(tmp_path)
    with ledger.locked():
        for number, last in enumerate((0.7, 0.8, 0.9), 1):
            done(ledger, member(number, "lora", 2**number), [0.5, 0.6, last, last])
        done(ledger, member(4, "lora", 3), [0.5, 0.1, 0.1, 0.1])  # of an earlier line's space
    return searching(given, SPACE, [], ()), ledger


def test_a_running_member_is_compared_with_finished_ones_of_its_method(
    at_work: tuple[Searching, Ledger],
) -> None:
    search, ledger = at_work
    free = (m for r in (16, 32, 64) if not is_control((m := member(9, "lora", r)).overrides))
    slow = ledger.write(next(free), state="running")
    assert search.hopeless(ledger, slow) is None  # nothing written yet
    told(ledger, slow, [0.5, 0.6])
    assert search.hopeless(ledger, slow) is None
    told(ledger, slow, [0.5, 0.6, 0.75])
    stop = search.hopeless(ledger, slow)
    assert stop is not None
    assert stop.reason == "hopeless: accuracy 0.75 by step 20, the median of 3 runs is 0.8"
    assert search.hopeless(ledger, slow) is None  # nothing new
    other = ledger.write(member(10, "dora", 32), state="running")
    told(ledger, other, [0.5, 0.6, 0.75])
    assert search.hopeless(ledger, other) is None
    tested = ledger.write(member(11, "lora", 32, seed=1), state="running")
    told(ledger, tested, [0.5, 0.6, 0.1])
    assert search.hopeless(ledger, tested) is None


def test_processes_run_what_a_search_asks_for(tmp_path: Path) -> None:
    given = Sweep(search="de", trials=7, metric="accuracy")
    search = searching(given, parse(["a=interval(0.0,0.05)"]), [], ())
    ledger = quick.planned(tmp_path / "s", [])

    def more() -> bool:
        with ledger.locked():
            known = len(ledger.members())
            new = search.propose(ledger)
            for number, words in enumerate(new, known + 1):
                ledger.write(Member(f"{number:012x}", number, words))
        return bool(new)

    worker = quick.worker(ledger, jobs=2)
    worker.ask_for_more = more
    worker.work()
    members = ledger.members()
    assert [m.state for m in members] == ["done"] * 7
    assert len({m.overrides for m in members}) == 7
    assert search.study.tuned(ledger.trials())[0].best == [members[-1].overrides]


def test_members_that_cannot_be_made_are_listed_and_the_search_goes_on(
    tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in tiny_run if not word.startswith(("run_dir=", "method.r="))]
    folder = tmp_path / "sweep"
    given = ["method.r=range(-9,2)", "sweep.search=random", "sweep.trials=3"]
    given += ["sweep.search_seed=1"]  # its first three are below 1
    assert cli.main(["-m", *words, *given, f"sweep_dir={folder}"]) == 1
    members = Ledger(folder).members()
    assert [m.state for m in members] == ["failed"] * 3
    assert len({m.overrides for m in members}) == 3
    assert all("method.r" in (m.reason or "") for m in members)
    assert "3 failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.lr=interval(1e-5,1e-3)"], "a grid needs values"),
        (["seed=0,1", "sweep.tuning_seeds=[0,1]"], "not searched over"),
        (["method.r=1,2", "sweep.tuning_seeds=[0]", "sweep.test_seeds=[0]"], "cannot be tested"),
        (["method.r=1,2", "sweep.lr_scale={lroa: 2}"], "Did you mean lora"),
        (["method.r=1,2", "sweep.prune=off"], "none | median | predict"),
        (["method.r=1,2", "sweep.prune=median"], "trainer.eval_steps"),
        (["method.r=range(-5,0)", "sweep.search=random"], "takes a whole number >= 1"),
    ],
)
def test_a_search_that_means_nothing_is_one_message(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    assert cli.main(["-m", "+recipe=lora_llama", *words, f"sweep_dir={folder}"]) == 2
    assert said in capsys.readouterr().err
    assert not folder.exists()
