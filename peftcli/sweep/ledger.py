"""The sweep folder: which members there are, what became of each, and what it measured.

    SWEEP_DIR/
      sweep.json                  the line that was given, and how members are run
      members/<id>/               an ordinary run folder, and beside its files
        member.json               what this file calls a `Member`
        output.log                what the member's process printed
      claims/<id>.<n>             who works on a member (see `claims`)

<id> is the beginning of a hash of the member's resolved configuration, so the same member is the
same folder whoever plans it. Files are written whole or not at all; many processes read and write
here at once. No torch, no Hydra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock

from peftcli import written
from peftcli.errors import ConfigError, DataError
from peftcli.folders import shown
from peftcli.train.folder import read_json, write_json

State = Literal["waiting", "running", "done", "failed", "stopped", "pruned"]
ENDED = ("done", "failed", "pruned")  # nobody works on these again unasked
FILE = "sweep.json"
# What the hash of a member leaves out: where a run lies, what it is called and where it is logged.
NOT_IN_HASH = ("run_dir", "name", "resume", "logger")
# Numbers beside the metrics that a search or a table may ask for.
COUNTED = (
    "num_trainable_params",
    "peak_memory",
    "tokens",
    "tokens_per_second",
    "train_time",
    "file_size",
)


@dataclass(frozen=True)
class Member:
    """One run of a sweep and what became of it."""

    id: str
    number: int  # from 1, in the order of planning
    overrides: tuple[str, ...]  # what it has of its own: one choice of every swept key
    state: State = "waiting"
    exit_code: int | None = None  # of its last process; negative: the signal that killed it
    reason: str | None = None  # why it failed or was stopped, in one line
    foretold: float | None = None  # score of its end, where it was stopped for that; not measured
    attempts: int = 0  # times that it was started
    seconds: float | None = None  # of all its starts together

    @property
    def title(self) -> str:
        """What it has of its own, in one line."""
        return " ".join(word.lstrip("+") for word in self.overrides) or "the run"


@dataclass(frozen=True)
class Trial:
    """A member as a search sees it. `metrics` are those of the end, and `COUNTED`; `foretold` is
    the score of a stopped run's end, which nobody measured.
    """

    overrides: tuple[str, ...]
    state: str
    metrics: Mapping[str, float]
    seconds: float | None
    foretold: float | None = None


class Ledger:
    """Reads and writes the members of a sweep folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.claims = folder / "claims"

    def exists(self) -> bool:
        """Whether a sweep was begun here."""
        return (self.folder / FILE).is_file()

    def begin(self, head: Mapping[str, Any]) -> None:
        """Write what the sweep is; after another line in the same folder, the new one counts."""
        write_json(self.folder / FILE, head)

    def head(self) -> dict[str, Any]:
        """What sweep.json says. Raises `ConfigError` where there is no sweep."""
        try:
            return read_json(self.folder / FILE)
        except FileNotFoundError:
            raise ConfigError(
                f"{self.folder}: is no sweep folder, since it has no {FILE}."
            ) from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Plan alone: no two processes add members at the same time. Makes the folder.

        Raises `ConfigError` where it cannot be made.
        """
        try:
            self.claims.mkdir(parents=True, exist_ok=True)
            (self.folder / "members").mkdir(exist_ok=True)
        except OSError as e:
            raise ConfigError(
                f"sweep_dir={self.folder}: cannot be written ({e.strerror}). Choose another one."
            ) from None
        with FileLock(self.folder / ".lock"):
            yield

    def run_dir(self, id: str) -> Path:
        """The run folder of a member."""
        return self.folder / "members" / id

    def members(self) -> list[Member]:
        """All members, in the order of planning."""
        found = [
            self.member(path.parent.name) for path in self.folder.glob("members/*/member.json")
        ]
        return sorted((m for m in found if m is not None), key=lambda m: (m.number, m.id))

    def member(self, id: str) -> Member | None:
        """One member as it is now; None where there is none."""
        path = self.run_dir(id) / "member.json"
        try:
            values = _read(path)
            return Member(**{**values, "overrides": tuple(values["overrides"])})
        except FileNotFoundError:
            return None
        except (TypeError, KeyError) as e:
            raise DataError(f"{path}: is no record of a member ({e}).{_remedy(path)}") from None

    def write(self, member: Member, **changes: Any) -> Member:
        """Put a member's record into its folder, with changes."""
        changed = dataclasses.replace(member, **changes)
        assert changed.state in get_args(State)
        self.run_dir(member.id).mkdir(parents=True, exist_ok=True)
        write_json(self.run_dir(member.id) / "member.json", dataclasses.asdict(changed))
        return changed

    def forget(self, id: str) -> None:
        """Take out a member that could not be composed, and now can."""
        (self.run_dir(id) / "member.json").unlink(missing_ok=True)
        if self.run_dir(id).is_dir():
            self.run_dir(id).rmdir()

    def trials(self) -> list[Trial]:
        """All members as a search sees them."""
        return [
            Trial(m.overrides, m.state, metrics(self.run_dir(m.id)), m.seconds, m.foretold)
            for m in self.members()
        ]


def _read(path: Path) -> dict[str, Any]:
    """A file in a member's folder. Raises `DataError` with what to do where it is damaged."""
    try:
        return read_json(path)
    except DataError as e:
        raise DataError(f"{e}{_remedy(path)}") from None


def _remedy(path: Path) -> str:
    return f" Take {shown(path.parent)} away, and the sweep's line runs this member anew."


def metrics(run_dir: Path) -> dict[str, float]:
    """What a finished run measured at its end; empty for one that is not finished."""
    result = run_dir / "result.json"
    if not result.is_file():
        return {}
    info = _read(result)["train_info"]
    measured = {**{key: info.get(key) for key in COUNTED}, **(info["metrics"].get("after") or {})}
    return {key: float(value) for key, value in measured.items() if isinstance(value, int | float)}


def id_of(config: Mapping[str, Any]) -> str:
    """The name of the member that has this resolved configuration."""
    kept = {key: value for key, value in config.items() if key not in NOT_IN_HASH}
    return written.digest(kept)[:12]


def id_of_words(overrides: Iterable[str]) -> str:
    """The name of a member whose configuration could not be made."""
    return written.digest(list(overrides))[:12]
