"""SIGTERM, SIGINT and SIGUSR1 ask the run to stop; it does so between two batches, with a
checkpoint.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from peftcli.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """Raised where the work can be left; the loop catches it, saves, and ends the run."""


class Stopper:
    """Remembers the first signal; a second SIGINT ends the process at once, which harms nothing
    that is on disk.
    """

    def __init__(self) -> None:
        self.received: str | None = None
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
        os.write(
            2, f"\n{self.received}: stopping after this batch (Ctrl-C again: at once)\n".encode()
        )

    def poll(self) -> None:
        """Raise `StopRequested` where a signal has come."""
        if self.received is not None:
            raise StopRequested(self.received)
