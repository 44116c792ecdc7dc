"""Other engines that start processes on several machines: joblib, Ray, SLURM through submitit.

Each only starts `sweep.workers` times `peft-train sweep-worker SWEEP_DIR`; these divide the members
among themselves by the folder, which all must see.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftcli.errors import ConfigError, Stopped
from peftcli.screen import say
from peftcli.settings import Sweep
from peftcli.sweep import submitting
from peftcli.sweep.board import Board
from peftcli.sweep.ledger import Ledger, Member

SCAN = 1.0  # seconds between looks at what the workers have done


@dataclass(frozen=True)
class Workers:
    """What a launcher is to start, so many times, with what options of its own. Once the file
    `stop` is there, workers end as soon as they have saved.
    """

    command: Sequence[str]
    count: int
    options: dict[str, Any]
    ledger: Ledger
    stop: Path

    @property
    def output(self) -> str:
        """The file that takes what workers print."""
        return output(self.ledger)


def run(ledger: Ledger, settings: Sweep, ids: set[str] | None) -> bool:
    """Start the workers, show what they do, and wait for their ends; whether a signal came, after
    which they have saved and stopped.
    """
    stop = ledger.folder / f"stop.{socket.gethostname()}.{os.getpid()}"
    where = str(ledger.folder.absolute())
    command = [sys.executable, "-m", "peftcli", "sweep-worker", where, "--stop-file", stop.name]
    workers = Workers(command, settings.workers, dict(settings.launcher_options), ledger, stop)
    say(f"{settings.workers} workers by {settings.launcher}", "cyan")
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(LAUNCHERS[settings.launcher], workers)
        follow = Follower(ledger, ids)
        was_stopped = False
        while not ended.done():
            try:
                wait([ended], SCAN)
                follow.look()
            except KeyboardInterrupt:
                was_stopped = True
                stop.touch()
        follow.look()
        codes = ended.result()
    stop.unlink(missing_ok=True)
    if broken := [code for code in codes if code not in (0, 1, Stopped.exit_code)]:
        say(
            f"{len(broken)} of {len(codes)} workers ended with exit code {broken[0]}; see "
            f"{output(ledger)}",
            "red",
        )
    return was_stopped


def output(ledger: Ledger) -> str:
    """The file that takes what workers print."""
    return str(ledger.folder.absolute() / "workers.log")


def call(command: Sequence[str], output: str) -> int:
    """In a worker's process: the exit code of a command."""
    with open(output, "ab") as file:
        return subprocess.call(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


class Follower:
    """Says what changes in a ledger."""

    def __init__(self, ledger: Ledger, ids: set[str] | None) -> None:
        self.ledger, self.ids = ledger, ids
        self.before = self._members()
        self.board = Board(len(self.before))

    def _members(self) -> dict[str, Member]:
        return {m.id: m for m in self.ledger.members() if self.ids is None or m.id in self.ids}

    def look(self) -> None:
        """Say what has changed since the last look."""
        now = self._members()
        for id, member in now.items():
            before = self.before.get(id)
            if before is None or before.state != member.state:
                if member.state == "running":
                    self.board.started(member, member.attempts > 1)
                elif member.state != "waiting":
                    self.board.ended(member, self.ledger)
        self.before = now


def joblib(workers: Workers) -> list[int]:
    """Worker processes by joblib; `launcher_options` are arguments of `joblib.Parallel`."""
    lib = _import("joblib")
    tasks = [lib.delayed(call)(workers.command, workers.output) for _ in range(workers.count)]
    return lib.Parallel(**{"n_jobs": workers.count, **workers.options})(tasks)


def ray(workers: Workers) -> list[int]:
    """Ray tasks; `launcher_options.task` are arguments of `ray.remote` (num_cpus, num_gpus), the
    others of `ray.init`.
    """
    lib, options = _import("ray"), dict(workers.options)
    of_task = options.pop("task", {})
    lib.init(
        **{"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR", **options}
    )
    try:
        task = lib.remote(call).options(**of_task)
        started = [task.remote(workers.command, workers.output) for _ in range(workers.count)]
        return lib.get(started)
    finally:
        lib.shutdown()


def submitit(workers: Workers) -> list[int]:
    """SLURM jobs; `launcher_options.cluster` chooses (slurm, local; without it, SLURM where it is
    installed), the others are parameters of submitit's executor (timeout_min: 60,
    slurm_partition).
    """
    work = submitting.Work(workers.command, workers.output)
    folder = workers.ledger.folder / "submitit"
    jobs = submitting.submitted(_import("submitit"), work, workers.count, workers.options, folder)
    return jobs.wait(workers.stop)


LAUNCHERS: dict[str, Callable[[Workers], list[int]]] = {
    "joblib": joblib,
    "ray": ray,
    "submitit": submitit,
}


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(
            f"sweep.launcher={name}: {name} is not installed: pip install 'peftcli[{name}]'"
        ) from None
