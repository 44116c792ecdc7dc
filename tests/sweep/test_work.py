"""Members are divided among processes that die, hang and fail; each is done exactly once."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from peftcli.sweep import claims, cost
from peftcli.sweep.ledger import Ledger
from peftcli.sweep.pruning import Stop
from tests.sweep import quick

ROOT = Path(__file__).parents[2]


def states(ledger: Ledger) -> list[str]:
    return [m.state for m in ledger.members()]


def test_all_members_are_run_and_their_ends_are_written_down(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", ["a=0", "b=0:4", "c=0:3", "d=0"])
    quick.worker(ledger, jobs=2).work()
    assert states(ledger) == ["done", "failed", "failed", "done"]
    a, b, c, _ = ledger.members()
    assert (a.exit_code, a.reason, a.attempts) == (0, None, 1)
    assert (b.exit_code, b.reason) == (4, "out of memory")
    assert (c.exit_code, c.reason) == (3, "ended with exit code 3 and left no word")
    assert a.seconds is not None
    assert [t.metrics for t in ledger.trials()] == [{"accuracy": 1.0}, {}, {}, {"accuracy": 4.0}]


def test_another_start_runs_only_what_is_missing(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", ["a=0", "b=0:1", "c=0"])
    quick.worker(ledger).work()
    quick.worker(ledger).work()
    assert [m.attempts for m in ledger.members()] == [1, 1, 1]
    ledger.write(ledger.members()[1], state="waiting")
    quick.worker(ledger).work()
    assert [m.attempts for m in ledger.members()] == [1, 2, 1]


def test_several_run_at_once_on_cores_of_their_own(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", [f"{x}=0.4" for x in "abcd"])
    started = time.monotonic()
    quick.worker(ledger, jobs=4).work()
    assert time.monotonic() - started < 1.5
    assert [s.environment.get("CUDA_VISIBLE_DEVICES") for s in quick.slots(3, ["5", "7"])] == [
        "5",
        "7",
        "5",
    ]
    cores = [quick.slots(2, [])[n].cores for n in (0, 1)]
    if len(os.sched_getaffinity(0)) > 1:
        assert not set(cores[0]) & set(cores[1])


def test_a_member_that_hangs_is_stopped_and_the_others_run(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", ["a=60", "b=0"])
    quick.worker(ledger, timeout=0.3).work()
    assert states(ledger) == ["failed", "done"]
    assert ledger.members()[0].reason == "took longer than sweep.timeout=0.3 seconds"


def test_no_member_is_started_once_too_many_have_failed(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", ["a=0:1", "b=0:1", "c=0", "d=0"])
    quick.worker(ledger, max_failures=2).work()
    assert states(ledger) == ["failed", "failed", "waiting", "waiting"]


def test_a_hopeless_member_is_stopped_with_its_reason(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", ["a=60", "b=0.1"])
    worker = quick.worker(ledger)
    stop = Stop("worse than the median", foretold=0.25)
    worker.hopeless = lambda ledger, m: stop if m.number == 1 else None
    worker.work()
    assert states(ledger) == ["pruned", "done"]
    assert ledger.members()[0].reason == "worse than the median"
    assert [t.foretold for t in ledger.trials()] == [0.25, None]


def test_a_signal_stops_the_members_and_a_later_start_goes_on(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", ["a=0.6", "b=0"])
    worker = quick.worker(ledger)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    worker.work()
    timer.join()
    assert worker.was_stopped
    assert states(ledger) == ["stopped", "waiting"]
    assert ledger.members()[0].exit_code == 75
    quick.worker(ledger).work()
    assert states(ledger) == ["done", "done"]


def test_a_search_is_asked_for_more_when_nothing_waits(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", ["a=0"])
    worker = quick.worker(ledger)

    def more() -> bool:
        members = ledger.members()
        if len(members) == 3:
            return False
        number = len(members) + 1
        ledger.write(quick.Member(f"{number:012x}", number, (f"x{number}=0",)))
        return True

    worker.ask_for_more = more
    worker.work()
    assert states(ledger) == ["done"] * 3


@pytest.mark.parametrize("seed", [0])
def test_killed_three_times_with_two_workers_each_member_is_done_exactly_once(
    tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    words = [f"m{i}=0.1" for i in range(24)]
    ledger = quick.planned(tmp_path / "s", words)
    command = [sys.executable, "-m", "tests.sweep.quick", str(ledger.folder)]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)

    workers = [start(), start()]
    for _ in range(3):
        begun = sum(len(quick.notes(ledger.run_dir(m.id), "begun")) for m in ledger.members())
        goal, deadline = begun + draw.randint(1, 5), time.monotonic() + 60
        while begun < goal and time.monotonic() < deadline:
            begun = sum(len(quick.notes(ledger.run_dir(m.id), "begun")) for m in ledger.members())
            time.sleep(0.01)
        victim = draw.randrange(2)
        workers[victim].kill()
        workers[victim].wait()
        workers[victim] = start()
    for one in workers:
        assert one.wait(timeout=60) == 0
    assert states(ledger) == ["done"] * len(words)
    for member in ledger.members():
        assert len(quick.notes(ledger.run_dir(member.id), "done")) == 1, member
    assert [t.metrics["accuracy"] for t in ledger.trials()] == list(range(1, len(words) + 1))


def test_a_member_s_cost_is_that_of_finished_ones_of_its_kind(tmp_path: Path) -> None:
    words = [("method=lora", "seed=0"), ("method=lora", "seed=1"), ("method=ssf", "seed=0")]
    lora, other, ssf = (quick.Member(str(i), i, w) for i, w in enumerate(words))
    lora = dataclasses.replace(lora, state="done", seconds=7.0)
    assert list(cost.expected([lora, other, ssf]).values()) == [7, 7, None]


# -- Claims ----------------------------------------------------------------------------------------
def test_one_of_many_gets_a_member(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", ["a=0"])
    first = claims.take(ledger.claims, "x", 60)
    assert first is not None
    assert claims.take(ledger.claims, "x", 60) is None
    first.release()
    second = claims.take(ledger.claims, "x", 60)
    assert second is not None
    assert second.path.name == "x.2"
    assert first.is_lost()
    second.release()


def test_a_claim_of_a_dead_process_is_over_at_once(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", ["a=0"])
    if (pid := os.fork()) == 0:
        claims.take(ledger.claims, "x", 3600)
        os._exit(0)
    os.waitpid(pid, 0)
    claim = claims.take(ledger.claims, "x", 3600)
    assert claim is not None
    claim.release()


def test_a_claim_from_another_machine_is_over_when_it_is_not_renewed(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", ["a=0"])
    theirs = claims.take(ledger.claims, "x", 60)
    assert theirs is not None
    said = json.loads(theirs.path.read_text())
    theirs.path.write_text(json.dumps({**said, "machine": "another", "host": "node7"}))
    os.utime(theirs.path, (time.time() - 50,) * 2)
    assert claims.take(ledger.claims, "x", 60) is None
    theirs.renewed = 0.0
    theirs.renew(every=15)
    assert time.time() - theirs.path.stat().st_mtime < 5
    os.utime(theirs.path, (time.time() - 70,) * 2)
    ours = claims.take(ledger.claims, "x", 60)
    assert ours is not None
    assert theirs.is_lost()
    ours.release()
    os.close(theirs.handle)
