"""Signals before a run has anything to save: they end the process, without a traceback."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOPPED = 75

heard: list[int] = []  # signals that have ended, or are about to end, what was going on


def end_at_once(number: int, frame: FrameType | None) -> None:
    """A handler for while the program's own modules are being read."""
    os._exit(STOPPED)


def until_a_run_has_its_own() -> None:
    """Have signals end this process by `KeyboardInterrupt`, until a run's own handlers exist."""
    heard.clear()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as a shell's background jobs have it
        signal.signal(signal.SIGINT, _stop)
    # a sweep blocks them while it forks
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise; but libraries take an interrupted import for a failed one, and go on without it."""
    heard.append(number)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            from peftcli.dist import causes

            causes.record("stopped before training; nothing to save", STOPPED)
            os._exit(STOPPED)
        frame = frame.f_back
    raise KeyboardInterrupt
