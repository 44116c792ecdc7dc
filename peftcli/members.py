"""Members of a sweep: each run in a process of its own, so that no failure reaches the next."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from omegaconf import DictConfig

from peftcli import config
from peftcli.errors import Stopped
from peftcli.screen import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
MEANING = {
    1: "failed",
    2: "configuration",
    3: "data or checkpoint",
    4: "out of memory",
    5: "non-finite numbers",
    75: "stopped",
}


class Members:
    """Starts members one after the other and keeps their exit codes.

    A signal goes to the one that runs, which saves and stops; then the sweep stops too.
    """

    def __init__(self) -> None:
        self.codes: dict[Path, int] = {}
        self.running: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def start(self, cfg: DictConfig, folder: Path) -> int:
        """Run one member to its end; its failure is kept for the report."""
        if not self.before:
            self.before = {number: signal.signal(number, self._forward) for number in SIGNALS}
        config.save(cfg, folder)
        say(f"run {len(self.codes) + 1}: {folder}", "bold cyan")
        # a process group of its own: Ctrl-C reaches it once, through us
        command = [sys.executable, "-m", "peftcli", "worker", str(folder)]
        self.running = subprocess.Popen(command, process_group=0)
        code = self.running.wait()
        self.running = None
        self.codes[folder] = code
        if self.stopped or code == Stopped.exit_code:
            self.report()
            raise KeyboardInterrupt
        return 0

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True
        if self.running is None:
            raise KeyboardInterrupt
        self.running.send_signal(number)

    def report(self) -> int:
        """List what did not end well; 1 where anything failed."""
        bad = {folder: code for folder, code in self.codes.items() if code}
        if self.codes:
            say(
                f"{len(self.codes) - len(bad)} of {len(self.codes)} runs done",
                "yellow" if bad else "green",
            )
        for folder, code in bad.items():
            reason = MEANING.get(code, f"killed by signal {-code}" if code < 0 else "failed")
            say(f"  {folder}: {reason} (exit code {code}); see {folder}/train.log", "red")
        return 1 if bad else 0
