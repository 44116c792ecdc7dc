"""A member's own process: where it runs, how it starts, what it says when it ends.

It is forked from this process, which has imported torch and transformers once and has no thread
but one, no model and no GPU; where some library has started a thread here, a fresh process is
started instead, since a fork would copy its locks without it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from peftcli import interrupts, screen
from peftcli.dist import causes
from peftcli.errors import OutOfMemory
from peftcli.sweep.claims import Claim
from peftcli.sweep.ledger import Member, State

OUTPUT = "output.log"
SIGNALS = (*interrupts.SIGNALS, signal.SIGHUP)
GRACE = 30.0  # seconds that a member has to save once it was told to stop
Body = Callable[[Path, int], int]  # a run folder, who started the process -> exit code
_FORKED = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Slot:
    """A share of this machine: a GPU, or some cores."""

    number: int
    cores: tuple[int, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def enter(self) -> None:
        """Stay within it, with every process that is started from here."""
        os.environ.update(self.environment)
        os.sched_setaffinity(0, self.cores)


def slots(jobs: int | str, gpus: Sequence[str]) -> list[Slot]:
    """Shares for so many members at once; `auto`: one a GPU, without GPUs one."""
    cores = sorted(os.sched_getaffinity(0))
    count = jobs if isinstance(jobs, int) else max(len(gpus), 1)
    found = []
    for n in range(count):
        own = tuple(cores[n::count]) or (cores[n % len(cores)],)
        environment = {} if count == 1 else {"OMP_NUM_THREADS": str(len(own))}
        if gpus and count > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[n % len(gpus)]
        found.append(Slot(n, own, environment))
    return found


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    # counting them may start CUDA, after which this process could not fork
    asked = _FORKED.Process(target=_exit_with_count)
    asked.start()
    asked.join()
    return [str(n) for n in range(asked.exitcode or 0)]


def _exit_with_count() -> None:
    import torch

    sys.exit(torch.cuda.device_count())


class Verdict(NamedTuple):
    """What becomes of a member."""

    state: State
    reason: str | None = None  # why it did not end well, in one line
    foretold: float | None = None  # its end, as a score: larger is better


@dataclass
class Running:
    """A member whose process has been started from here."""

    member: Member
    claim: Claim
    slot: Slot
    folder: Path
    process: subprocess.Popen[bytes] | BaseProcess
    started: float = field(default_factory=time.monotonic)
    told: float | None = None  # when it was told to stop
    verdict: Verdict | None = None  # what it was told to stop for
    judged: float = 0.0  # when it was last looked at for that

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.started

    def exit_code(self) -> int | None:
        """Of the process, None while it lives; negative: the signal that ended it."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask it to save and end; again, to end at once."""
        self.told = self.told or time.monotonic()
        self._send(number)

    def kill_if_deaf(self) -> None:
        """End it, with what it has started, where it has had its time to save."""
        if self.told is not None and time.monotonic() - self.told > GRACE:
            self.kill()

    def kill(self) -> None:
        """End it and what it has started."""
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        pid = self.process.pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL and os.getpgid(pid) == pid:
                os.killpg(pid, number)
            else:
                os.kill(pid, number)

    def reason(self, code: int) -> str:
        """Why it failed, in one line: what it wrote down, or what its end tells."""
        cause = causes.of_member(self.folder)
        if cause is not None:
            return one_line(cause.text)
        if code == -signal.SIGKILL:
            return "killed by SIGKILL; the system does so when memory runs out"
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if code == OutOfMemory.exit_code:
            return "out of memory"
        return f"ended with exit code {code} and left no word"


def one_line(text: str) -> str:
    """The first line of a message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"


def warm_up() -> None:
    """Import what every member needs, once, before any is forked: five seconds or so."""
    importlib.import_module("peftcli.run")
    importlib.import_module("transformers.optimization")  # a run's schedule; imports a compiler


def as_run(folder: Path, parent: int) -> int:
    """What a member does: `peft-train worker FOLDER PARENT`, in this process."""
    from peftcli import cli

    return cli.main(["worker", str(folder), str(parent)])


def start(
    member: Member,
    claim: Claim,
    slot: Slot,
    folder: Path,
    others: Sequence[Running],
    body: Body = as_run,
) -> Running:
    """Start the member's process in its slot; what it prints goes to output.log in its folder."""
    causes.forget(folder)
    sys.stdout.flush()
    sys.stderr.flush()
    if body is not as_run or _has_one_thread():
        handles = [running.claim.handle for running in others]
        arguments = (folder, slot, os.getpid(), handles, body)
        process = _FORKED.Process(target=_be_member, args=arguments)
        gc.freeze()  # what is here stays shared between the processes
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the member has its own handlers
        process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        gc.unfreeze()
    else:
        process = _start_fresh(claim, slot, folder)
    return Running(member, claim, slot, folder, process)


def _has_one_thread() -> bool:
    return len(os.listdir("/proc/self/task")) == 1


def _be_member(folder: Path, slot: Slot, parent: int, handles: Sequence[int], body: Body) -> None:
    """In the forked process."""
    for handle in handles:
        os.close(handle)  # the claims of others
    os.setpgid(0, 0)  # Ctrl-C reaches it once, through the process that works on the sweep
    sys.stdout = sys.stderr = open(folder / OUTPUT, "a", buffering=1, encoding="utf-8")
    for number in (1, 2):
        os.dup2(sys.stdout.fileno(), number)
    screen.renew()
    slot.enter()
    sys.exit(body(folder, parent))


def _start_fresh(claim: Claim, slot: Slot, folder: Path) -> subprocess.Popen[bytes]:
    """The same in a process that imports everything anew."""
    command = [sys.executable, "-m", "peftcli", "worker", str(folder), str(os.getpid())]
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, slot.cores)  # inherited
    try:
        with open(folder / OUTPUT, "ab") as output:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, **slot.environment},
                process_group=0,
                pass_fds=[claim.handle],
            )
    finally:
        os.sched_setaffinity(0, before)
