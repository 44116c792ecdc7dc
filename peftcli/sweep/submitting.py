"""Workers of a sweep in the jobs of a cluster, through submitit: they are queued, saved and queued
again when their time is over, and taken back when the sweep is stopped.

Whether a job still lives is asked of `squeue`, which every SLURM has; submitit asks the accounting,
which many have not.
"""

from __future__ import annotations

import getpass
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.errors import ConfigError, Stopped, first_sentence
from peftcli.screen import say

# Of submitit's own, five minutes and three times would cut most sweeps short.
DEFAULTS = {"timeout_min": 60, "name": "peftcli-sweep"}
REQUEUES = 1000  # times that a job whose time was over goes on in another
OF_EXECUTOR = ("slurm_max_num_timeout", "slurm_python")  # are given when it is made, unlike others
LOOK = 5.0  # seconds between looks at the queue
LATE = 15.0  # seconds after its job that a file may take to be seen on a shared disk


@dataclass
class Work:
    """What submitit keeps of a worker, and calls in its job."""

    command: Sequence[str]
    output: str
    process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """The worker's exit code."""
        with open(self.output, "ab") as file:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        return self.process.wait()

    def checkpoint(self) -> Any:
        """Have the members saved before the job's time is over; what the job does when it comes
        again. submitit calls it from a signal's handler, in the midst of `__call__`.
        """
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.terminate()
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Work(self.command, self.output))


@dataclass
class Jobs:
    """The jobs of the workers, until the last has ended."""

    jobs: list[Any]
    in_slurm: bool
    taken_back: set[str] = field(default_factory=set)

    def wait(self, stop: Path) -> list[int]:
        """The workers' exit codes; once the file `stop` is there, no queued job begins any more."""
        while living := self._living():
            if stop.exists():
                self._take_back(living)
            time.sleep(LOOK if self.in_slurm else 0.5)
        return [self._exit_code(job) for job in self.jobs if job.job_id not in self.taken_back]

    def _living(self) -> dict[str, str]:
        """The state of every job that has not ended; of all where SLURM does not answer."""
        if not self.in_slurm:
            return {job.job_id: "RUNNING" for job in self.jobs if not job.done()}
        asked = ["squeue", "--noheader", "--format=%A %T", f"--user={getpass.getuser()}"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False)
        if answer.returncode:
            return {job.job_id: "UNKNOWN" for job in self.jobs}
        states = dict(line.split() for line in answer.stdout.splitlines())
        return {job.job_id: states[job.job_id] for job in self.jobs if job.job_id in states}

    def _take_back(self, living: dict[str, str]) -> None:
        for job in self.jobs:
            if living.get(job.job_id) == "PENDING" and job.job_id not in self.taken_back:
                job.cancel(check=False)
                self.taken_back.add(job.job_id)

    def _exit_code(self, job: Any) -> int:
        """Of a job that has ended; one that left no result is told of, and can be resumed."""
        until = time.monotonic() + LATE
        while not job.paths.result_pickle.exists():
            if time.monotonic() > until:
                why = "ended without a word: cancelled, killed, or its node failed"
                return _told(job, why)
            time.sleep(0.5)
        error = job.exception()
        if error is None:
            return int(job.result())
        lines = [line for line in str(error).splitlines() if "Error: " in line]
        return _told(job, lines[-1].strip() if lines else type(error).__name__)


def _told(job: Any, why: str) -> int:
    say(f"job {job.job_id} {why}; see {job.paths.stderr}", "yellow")
    return Stopped.exit_code


def submitted(lib: Any, work: Work, count: int, options: dict[str, Any], folder: Path) -> Jobs:
    """Queue the work `count` times, or as often as the cluster takes it. Raises `ConfigError` where
    submitit or the cluster refuses the options.
    """
    jobs: list[Any] = []
    try:
        executor = _executor(lib, options, folder)
        with _outside_of_jobs(lib):
            for _ in range(count):
                jobs.append(executor.submit(work))
    except (AssertionError, NameError, ValueError, TypeError, RuntimeError) as e:  # submitit's own
        if not jobs:
            raise ConfigError(f"sweep.launcher_options={options}: {first_sentence(e)}") from None
        say(f"{len(jobs)} of {count} workers; no more were taken: {first_sentence(e)}", "yellow")
    say(f"jobs {', '.join(job.job_id for job in jobs)}; what they print: {folder}")
    return Jobs(jobs, in_slurm=isinstance(jobs[0], lib.SlurmJob))


def _executor(lib: Any, options: dict[str, Any], folder: Path) -> Any:
    given = {**DEFAULTS, **options}
    made = {"slurm_max_num_timeout": REQUEUES}
    made |= {key: given.pop(key) for key in OF_EXECUTOR if key in given}
    executor = lib.AutoExecutor(str(folder), given.pop("cluster", None), **made)
    executor.update_parameters(**given)
    return executor


@contextmanager
def _outside_of_jobs(lib: Any) -> Iterator[None]:
    """Without the variables of a job that this process is in, but for where SLURM is."""
    place = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
    if "SLURM_JOB_ID" not in os.environ:
        yield
        return
    with lib.helpers.clean_env():
        os.environ.update(place)
        yield
