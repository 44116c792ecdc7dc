"""Who works on a member. Any number of processes, on any machines that share the folder, may want
the same one; one gets it.

`claims/<id>.<n>` is the n-th claim on the member. Making the next number is atomic (a hard link
that exists already is refused), so of several processes that find the n-th one over, one gets on;
no claim is ever removed, so none is mistaken for an earlier one. A claim is over when it says so.
On this machine it is also over when nobody holds its lock, which the kernel takes from the dead:
both the process that works on the sweep and the member's own hold it, so a member that outlives its
starter for a moment is left in peace. For processes on other machines the file's time counts, which
its holder renews.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftcli.train.folder import read_json, write_json

BOOT = Path("/proc/sys/kernel/random/boot_id")  # a machine's identity, until it starts again


@dataclass
class Claim:
    """A member that this process works on."""

    path: Path
    handle: int  # of the locked file; the member's process inherits it
    renewed: float = field(default_factory=time.monotonic)

    def renew(self, every: float) -> bool:
        """Show, every so many seconds, that somebody is here; False where the member was taken
        over meanwhile.
        """
        if time.monotonic() - self.renewed < every:
            return True
        os.utime(self.path)
        self.renewed = time.monotonic()
        return not self.is_lost()

    def is_lost(self) -> bool:
        """Whether another process has taken the member over."""
        stem, number = self.path.name.rsplit(".", 1)
        return self.path.with_name(f"{stem}.{int(number) + 1}").exists()

    def release(self) -> None:
        """End it."""
        write_json(self.path, {**read_json(self.path), "over": True})
        os.close(self.handle)


def take(folder: Path, id: str, stale_after: float) -> Claim | None:
    """The claim on member `id`; None where somebody else has it."""
    number = max((int(p.suffix[1:]) for p in folder.glob(f"{id}.*")), default=0)
    if number and not is_over(folder / f"{id}.{number}", stale_after):
        return None
    path = folder / f"{id}.{number + 1}"
    aside = folder / f".{path.name}.{socket.gethostname()}.{os.getpid()}"
    handle = os.open(aside, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
    fcntl.flock(handle, fcntl.LOCK_EX)
    os.write(handle, (json.dumps(_holder(), indent=2) + "\n").encode())
    try:
        os.link(aside, path)
    except FileExistsError:
        os.close(handle)
        return None
    finally:
        aside.unlink()
    return Claim(path, handle)


def holder(folder: Path, id: str) -> str:
    """'HOST, process N' of the newest claim on a member; empty where there is none."""
    newest = max(folder.glob(f"{id}.*"), key=lambda p: int(p.suffix[1:]), default=None)
    if newest is None:
        return ""
    said = read_json(newest)
    return f"{said['host']}, process {said['pid']}"


def is_over(path: Path, stale_after: float) -> bool:
    """Whether nobody works on what this file claims."""
    said = read_json(path)
    if said.get("over"):
        return True
    if said["machine"] == _holder()["machine"]:
        return not _is_locked(path)
    return _now(path.parent) - path.stat().st_mtime > stale_after


def _holder() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": BOOT.read_text().strip(),
        "pid": os.getpid(),
        "time": time.time(),
    }


def _is_locked(path: Path) -> bool:
    with open(path) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _now(folder: Path) -> float:
    """The time by the clock that stamps the folder's files, which may be another machine's."""
    probe = folder / f".now.{socket.gethostname()}.{os.getpid()}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()
