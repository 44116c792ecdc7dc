"""Signals before a run has anything to save: they end the process, without a traceback."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

STOPPED = 75
# Ctrl-C, a system that ends jobs, and what batch systems send before they do (submitit: the last)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

heard: list[int] = []  # signals that have ended, or are about to end, what was going on


def end_at_once(number: int, frame: FrameType | None) -> None:
    """A handler for while the program's own modules are being read."""
    os._exit(STOPPED)


def until_a_run_has_its_own() -> None:
    """Have signals end this process by `KeyboardInterrupt`, until a run's own handlers exist."""
    heard.clear()
    for number in SIGNALS:
        if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)  # a shell's background jobs ignore SIGINT
    # a sweep blocks them while it forks
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """A handler that raises; but libraries take an interrupted import for a failed one, and go on
    without it.
    """
    heard.append(number)
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os._exit(recorded())
        frame = frame.f_back
    raise KeyboardInterrupt


@contextmanager
def heard_in_waits() -> Iterator[None]:
    """While a library waits for other processes without coming back to the interpreter, which alone
    calls handlers: signals end this process at once.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        while numbers := os.read(read, 1):
            if numbers[0] in SIGNALS:
                os._exit(recorded())

    before = signal.set_wakeup_fd(write)  # the system's handler writes a signal's number there
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write)
        thread.join()
        os.close(read)


def recorded() -> int:
    """Leave word that this process was stopped; its exit code."""
    from peftcli.dist import causes

    causes.record("stopped before training; nothing to save", STOPPED)
    return STOPPED
