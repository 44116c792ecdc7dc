"""The run folder: who may write in it, what it holds, and what becomes of what was there before."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from peftcli.disk import write_whole
from peftcli.errors import ConfigError, DataError
from peftcli.folders import shown
from peftcli.train.loggers import Sink
from peftcli.train.rotation import by_step, step_of

KEPT = (".hydra", ".lock", "previous")


class RunFolder:
    """Paths of a run folder: config.yaml, train.log, metrics.jsonl, result.json, adapter/,
    checkpoints/.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.result = path / "result.json"
        self.log = path / "train.log"
        self.adapter = path / "adapter"
        self.best = path / "adapter-best"
        self.checkpoints = path / "checkpoints"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; a second one is refused while the first lives."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / ".lock", "a+")
        except OSError as e:
            raise ConfigError(
                f"run_dir={self.path}: cannot be written ({e.strerror}). Choose another run_dir."
            ) from None
        with handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                handle.seek(0)
                raise ConfigError(
                    f"run_dir={self.path} is in use by another run ({handle.read().strip()})."
                    " Wait for it, stop it, or choose another run_dir."
                ) from None
            handle.truncate(0)
            handle.write(f"{socket.gethostname()} process {os.getpid()}\n")
            handle.flush()
            yield

    def set_aside(self) -> Path | None:
        """Move an earlier run's files into previous/N/, so that nothing is lost; None where there
        is nothing.
        """
        kept = (*KEPT, "config.yaml")
        return self._shelve([p for p in self.path.iterdir() if p.name not in kept])

    def set_aside_after(self, step: int) -> Path | None:
        """The same with what came after a step: later checkpoints and what was published."""
        later = [p for p in by_step(self.checkpoints) if step_of(p) > step]
        published = [p for p in (self.adapter, self.best, self.result) if p.exists()]
        return self._shelve([*later, *published])

    def _shelve(self, paths: Sequence[Path]) -> Path | None:
        if not paths:
            return None
        shelf = self.path / "previous"
        shelf.mkdir(exist_ok=True)
        numbers = [int(p.name) for p in shelf.iterdir() if p.name.isdigit()]
        target = shelf / str(1 + max(numbers, default=0))
        for path in paths:
            place = target / path.relative_to(self.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
        return target

    def write_result(self, result: Mapping[str, Any]) -> None:
        """result.json, whole or not at all."""
        write_json(self.result, result)


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all. Raises `DataError` where it cannot be written."""
    try:
        write_whole(path, json.dumps(value, indent=2, default=str) + "\n")
    except OSError as e:
        raise DataError(f"cannot write {path}: {e.strerror}.") from None


class Log(Protocol):
    """Takes the records of a run."""

    def write(self, record: Mapping[str, Any]) -> None:
        """A record of a step."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class NoLog:
    """Of the ranks that write nothing."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Rank 0 has written it."""

    def close(self) -> None:
        """Nothing to end."""


class MetricsLog:
    """metrics.jsonl: one line a record, flushed at once, and the numbers to the run's logger.

    What a resumed run will do again is cut off first: steps after `step`, and evaluations after
    that of step `evaluated`.
    """

    def __init__(self, path: Path, step: int, evaluated: int, sink: Sink) -> None:
        self.path, self.sink = path, sink

        def stays(line: str) -> bool:
            record = json.loads(line)
            return record["step"] <= (step if "loss" in record else evaluated)

        kept = [line for line in self._lines() if stays(line)]
        write_whole(path, "".join(kept))

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [
            line for line in lines if line.endswith("\n") and line.strip()
        ]  # a torn last line is dropped

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record."""
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as e:
            raise DataError(f"cannot write {self.path}: {e.strerror}") from e
        numbers = {**record, **record.get("wall", {})}
        self.sink.write(
            record["step"], {k: v for k, v in numbers.items() if isinstance(v, int | float)}
        )

    def close(self) -> None:
        """End the logger."""
        self.sink.close()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping. Raises `DataError` where it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as e:
        raise DataError(f"{shown(path)}: cannot be read ({e}).") from None
    if not isinstance(value, dict):
        raise DataError(f"{shown(path)}: holds no mapping of keys.")
    return value
