"""Why a run ended, written down by its process for the one that started it. Every rank of a run
leaves its first exception, and the launcher shows the earliest once; a member of a sweep leaves
what ended it in its folder.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from peftcli.disk import write_whole
from peftcli.errors import Stopped

FOLDER = "PEFTCLI_CAUSES"  # in the environment of ranks that our launcher started
MEMBER = "PEFTCLI_MEMBER"  # in that of a sweep's member: its run folder
TORCHRUN = "TORCHELASTIC_ERROR_FILE"  # in that of all ranks that torch's agents started
OF_MEMBER = "cause.json"


@dataclass(frozen=True)
class Cause:
    """What ended a rank: the message and the exit code."""

    rank: int
    text: str
    exit_code: int
    time: float


def record(text: str, exit_code: int) -> bool:
    """Write down why this process ends; whether somebody else shows it: the launcher, or rank 0."""
    rank = os.environ.get("RANK")
    folder, torchruns = os.environ.get(FOLDER), os.environ.get(TORCHRUN)
    cause = Cause(int(rank or 0), text, exit_code, time.time())
    if rank is None:
        if member := os.environ.get(MEMBER):
            write_whole(Path(member) / OF_MEMBER, json.dumps(asdict(cause)))
        return False
    if torchruns:
        told = {"message": text, "timestamp": str(int(cause.time))}
        write_whole(Path(torchruns), json.dumps(told))
    if folder:
        write_whole(Path(folder) / f"cause-{rank}.json", json.dumps(asdict(cause)))
    return bool(folder) or (exit_code == Stopped.exit_code and rank != "0")  # all are stopped alike


def first(folder: Path, exit_codes: Mapping[int, int]) -> Cause:
    """The first cause among what ranks wrote down and their `exit_codes`; a rank that a signal
    killed wrote nothing, and what the others then met follows from it.
    """
    for rank, code in exit_codes.items():
        if code < 0 and not (folder / f"cause-{rank}.json").exists():
            return Cause(rank, _killed(rank, -code), 1, 0.0)
    files = folder.glob("cause-*.json")
    causes = [Cause(**json.loads(path.read_text(encoding="utf-8"))) for path in files]
    if causes:
        return min(causes, key=lambda cause: cause.time)
    rank, code = next(iter(exit_codes.items()))
    return Cause(rank, f"rank {rank} ended with exit code {code} and left no word.", code, 0.0)


def told(folder: Path) -> set[int]:
    """The ranks that wrote down what ended them."""
    return {int(path.stem.removeprefix("cause-")) for path in folder.glob("cause-*.json")}


def of_member(folder: Path) -> Cause | None:
    """What ended the member of this run folder at its last start; None where it left no word."""
    try:
        return Cause(**json.loads((folder / OF_MEMBER).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def forget(folder: Path) -> None:
    """Before another start."""
    (folder / OF_MEMBER).unlink(missing_ok=True)


def _killed(rank: int, number: int) -> str:
    name = signal.Signals(number).name
    hint = ""
    if number == signal.SIGKILL:
        hint = (
            " The system does so when memory runs out: then use fewer processes a node, halve"
            " trainer.per_device_train_batch_size, or take strategy=fsdp."
        )
    return f"rank {rank} was killed by {name}; the other ranks were stopped.{hint}"
