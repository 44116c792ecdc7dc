"""SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask a training to stop; it does so between two steps, with
a checkpoint. What comes before has nothing to save, and they end it at once.
"""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType
from typing import Any

from peftcli import interrupts
from peftcli.dist.ranks import Ranks
from peftcli.errors import Stopped

TIME_IS_OVER = signal.SIGALRM  # of a run's own clock, `trainer.stop_after`


class StopRequested(Exception):  # noqa: N818 - a request, not an error
    """Raised where the work can be left; the loop catches it, saves, and ends the run."""


class Stopper:
    """Remembers the first signal; a second SIGINT ends the process at once, which harms nothing
    that is on disk. Among several ranks a signal to one of them stops all, at the same place.
    """

    def __init__(
        self, quiet: bool = False, training: bool = True, stop_after: float | None = None
    ) -> None:
        self.received: str | None = None
        self.quiet, self.training = quiet, training
        self.until = math.inf if stop_after is None else time.monotonic() + stop_after
        self.ranks = Ranks()
        self._held: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        """Take over the signals."""
        for number in (*interrupts.SIGNALS, TIME_IS_OVER):
            self._held[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Give them back."""
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        for number, handler in self._held.items():
            signal.signal(number, handler)

    def begin(self, ranks: Ranks) -> None:
        """From now on there is something to save, by these `ranks`."""
        if interrupts.heard:  # of an interrupt that a library took for its own
            raise KeyboardInterrupt
        self.ranks, self.training = ranks, True
        if self.until < math.inf:
            left = max(self.until - time.monotonic(), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.training:
            interrupts.stop(number, frame)
        if self.received is not None and number == signal.SIGINT:
            os.write(2, b"\nstopped at once; the newest checkpoint is intact\n")
            os._exit(Stopped.exit_code)
        self.received = signal.Signals(number).name
        if not self.quiet:
            said = f"\n{named(number)}: stopping after this step (Ctrl-C again: at once)\n"
            os.write(2, said.encode())

    def poll(self) -> None:
        """Raise `StopRequested` where a signal has come to any rank; all ranks ask together."""
        number = self.ranks.most(signal.Signals[self.received] if self.received else 0)
        if number:
            raise StopRequested(named(number))


def named(number: int) -> str:
    """What asked for the stop."""
    is_own = number == TIME_IS_OVER
    return "trainer.stop_after" if is_own else signal.Signals(number).name
