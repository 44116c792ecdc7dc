"""SIGTERM, SIGINT and SIGUSR1 ask the run to stop; it does so between two batches, with a
checkpoint.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from peftcli.dist.ranks import Ranks
from peftcli.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """Raised where the work can be left; the loop catches it, saves, and ends the run."""


class Stopper:
    """Remembers the first signal; a second SIGINT ends the process at once, which harms nothing
    that is on disk. Among several ranks a signal to one of them stops all, at the same place.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.received: str | None = None
        self.quiet = quiet
        self.ranks = Ranks()
        self._held: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        """Take over the signals."""
        for number in SIGNALS:
            self._held[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        for number, handler in self._held.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            os.write(2, b"\nstopped at once; the newest checkpoint is intact\n")
            os._exit(Stopped.exit_code)
        self.received = signal.Signals(number).name
        if not self.quiet:
            said = f"\n{self.received}: stopping after this batch (Ctrl-C again: at once)\n"
            os.write(2, said.encode())

    def poll(self) -> None:
        """Raise `StopRequested` where a signal has come to any rank; all ranks ask together."""
        number = self.ranks.most(signal.Signals[self.received] if self.received else 0)
        if number:
            raise StopRequested(signal.Signals(number).name)
