"""Workers in a cluster's jobs, when a job's time is over, its end comes early, or a sweep stops."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftcli.errors import ConfigError
from peftcli.sweep import submitting
from peftcli.sweep.submitting import Jobs, Work, submitted

lib: Any = pytest.importorskip("submitit", reason="submitit is not installed")
WORKER = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), print("saved"), sys.exit(75)))
print("works", flush=True)
time.sleep(60)
"""


@pytest.fixture
def job_signal() -> Iterator[signal.Signals]:
    """The one that submitit has a cluster send when a job's time is nearly over."""
    before = signal.getsignal(signal.SIGUSR2)
    yield signal.SIGUSR2
    signal.signal(signal.SIGUSR2, before)


def test_when_a_jobs_time_is_over_its_worker_saves_and_comes_again(
    job_signal: signal.Signals, tmp_path: Path
) -> None:
    output = tmp_path / "workers.log"
    work, again = Work([sys.executable, "-c", WORKER], str(output)), []
    signal.signal(job_signal, lambda *_: again.append(work.checkpoint()))

    def send() -> None:
        while not output.exists() or "works" not in output.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), job_signal)

    threading.Thread(target=send, daemon=True).start()
    assert work() == 75
    assert output.read_text().splitlines() == ["works", "saved"]
    assert again[0].function == Work(work.command, work.output)


class Slurm:
    """Commands of these names that answer as Slurm 22.05 does, out of a list of jobs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.queue = folder, folder / "queue"
        for name, script in {
            "srun": "exit 1",
            "squeue": f"cat {self.queue}",
            "scancel": f'sed -i "/^$1 /d" {self.queue}; echo $1 >> {folder}/cancelled',
            "sbatch": "echo sbatch: error: invalid partition specified: nope >&2; exit 1",
        }.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    def jobs(self, *states: str) -> Jobs:
        """Of these states, numbered from 18."""
        ids = [str(n) for n in range(18, 18 + len(states))]
        self.queue.write_text("".join(f"{i} {s}\n" for i, s in zip(ids, states, strict=True)))
        return Jobs([lib.SlurmJob(self.folder, i) for i in ids], in_slurm=True)

    def end(self, job: Any, *result: Any) -> None:
        """The job leaves the queue, and a result if it has one."""
        if result:
            lib.core.utils.cloudpickle_dump(result, job.paths.result_pickle)
        left = [x for x in self.queue.read_text().splitlines() if x.split()[0] != job.job_id]
        self.queue.write_text("".join(f"{line}\n" for line in left))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """A queue of Slurm, looked at often."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(submitting, "LOOK", 0.02)
    monkeypatch.setattr(submitting, "LATE", 0.1)
    return Slurm(tmp_path)


def test_a_sweep_that_is_stopped_takes_back_the_jobs_that_wait_and_waits_for_the_others(
    slurm: Slurm, tmp_path: Path
) -> None:
    jobs, stop = slurm.jobs("RUNNING", "PENDING"), tmp_path / "stop"
    stop.touch()
    threading.Timer(0.3, slurm.end, (jobs.jobs[0], "success", 75)).start()
    assert jobs.wait(stop) == [75]
    assert (tmp_path / "cancelled").read_text() == "19\n"


def test_a_job_that_ends_without_a_result_is_told_of_and_not_waited_for(
    slurm: Slurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = slurm.jobs("RUNNING", "COMPLETING")
    slurm.end(jobs.jobs[0])
    slurm.end(jobs.jobs[1], "error", "Traceback:\nUncompletedJobError: Job not requeued")
    assert jobs.wait(tmp_path / "stop") == [75, 75]
    said = " ".join(capsys.readouterr().err.split())
    assert "job 18 ended without a word: cancelled, killed, or its node failed; see" in said
    assert "job 19 UncompletedJobError: Job not requeued; see" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"slurm_partition": "nope"}, "invalid partition specified: nope"),
        ({"slurm_partion": "nope"}, "Unknown argument 'partion'"),
        ({"cluster": "pbs"}, "pbs"),
    ],
    ids=str,
)
def test_options_that_are_refused_are_named(
    options: dict[str, Any], said: str, slurm: Slurm, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.launcher_options=.*" + said):
        submitted(lib, Work(["true"], str(tmp_path / "log")), 2, options, tmp_path / "submitit")
