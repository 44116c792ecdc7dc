"""Ranks that no longer answer: each writes where it stands, through a thread that needs nothing of
the interpreter, before the others give up on it.
"""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from peftcli.errors import ConfigError

ALL = "stacks-rank-*.txt"  # in the run folder, of ranks that made no progress
RESTARTS = ("PEFTCLI_RESTARTS", "TORCHELASTIC_RESTART_COUNT")  # our launcher's, and torch's
SHARE = 0.9  # of launch.timeout, after which they are written


def name(rank: int | str) -> str:
    """The file of a rank at this start of the run; each start again has its own."""
    again = next((n for key in RESTARTS if (n := int(os.environ.get(key, 0)))), 0)
    return f"stacks-rank-{rank}{f'-restart-{again}' if again else ''}.txt"


class Watch:
    """Has the Python stacks of all threads of this process written to the run folder when it makes
    no progress: when `timeout` seconds are nearly over without a call of `alive`. The file is there
    only as long as it may be needed.
    """

    def __init__(self, folder: Path, rank: int, timeout: float) -> None:
        self.path, self.seconds = folder / name(rank), SHARE * timeout
        self._file: TextIO

    def __enter__(self) -> Watch:
        """Begin to watch. Raises `ConfigError` where the run folder cannot be written here."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            self._file = open(self.path, "a", encoding="utf-8")
        except OSError as e:
            raise ConfigError(
                f"run_dir={self.path.parent}: cannot be written on this node ({e.strerror}). "
                "Choose another run_dir."
            ) from None
        self.alive()
        return self

    def alive(self) -> None:
        """Progress: the time begins anew, and what an earlier wait has written is forgotten."""
        if os.fstat(self._file.fileno()).st_size:
            os.truncate(self._file.fileno(), 0)
        faulthandler.dump_traceback_later(self.seconds, file=self._file)

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        """Stop watching. Stacks stay where the run fails."""
        faulthandler.cancel_dump_traceback_later()
        is_empty = not os.fstat(self._file.fileno()).st_size
        self._file.close()
        if kind is None or is_empty:
            self.path.unlink(missing_ok=True)


def forget(folder: Path) -> None:
    """What earlier runs in the folder left."""
    for path in folder.glob(ALL):
        path.unlink()


def told(folder: Path, silent: Iterable[int], timeout: float) -> str | None:
    """Which ranks no longer answered and where they stood, where this start of the run in the
    folder ended by that. `silent`: ranks that left no word, which alone come into question.
    """
    files = {rank: folder / name(rank) for rank in silent}
    written = [path for path in folder.glob(name("*")) if path.stat().st_size]
    if not files or not written:
        return None
    said = []
    for rank, path in files.items():
        if path in written:
            said.append(f"where rank {rank} stood: {path}")
        else:
            path.unlink(missing_ok=True)
            said.append(f"rank {rank} left no stacks; was it stopped from outside?")
    ranks = " and ".join(f"rank {rank}" for rank in files)
    return f"{ranks} did not answer for launch.timeout={timeout:g} seconds; {'; '.join(said)}"
