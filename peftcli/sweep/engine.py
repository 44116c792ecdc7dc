"""`peft-train -m`: from the words of a line to a finished sweep folder.

All members are composed and checked before any runs. The folder is the only thing that processes
share: whoever plans, works, stops or is killed, the same line goes on from what it says.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from peftcli import config, folders
from peftcli.errors import ConfigError, Stopped, UserError
from peftcli.screen import log_to, say
from peftcli.settings import Sweep
from peftcli.sweep import board, cost, process
from peftcli.sweep.ledger import ENDED, FILE, Ledger, Member, id_of_words
from peftcli.sweep.line import Composer, Line, Words
from peftcli.sweep.searching import Searching, searching
from peftcli.sweep.work import Hopeless, Worker
from peftcli.train.folder import read_json
from peftcli.versions import versions

LOG = "sweep.log"


@dataclass(frozen=True)
class Planned:
    """A member as a line means it; without a configuration where there is a reason why not."""

    id: str
    words: Words  # its own
    unmade_id: str  # of the same words where they cannot be composed
    cfg: DictConfig | None = None
    reason: str | None = None
    exit_code: int | None = None


def main(args: argparse.Namespace) -> int:
    """`peft-train -m`: every combination of the line's choices."""
    composer = Composer(args.config_dirs, args.config_name)
    line = composer.read(args.overrides)
    search = searching(line.sweep, line.space, line.given, args.config_dirs)
    members = [] if search.proposes else line.grid
    flags = {"dry_run": args.dry_run, "retry_failed": args.retry_failed}
    return run(members, line, composer, search=search, **flags)


def run(
    members: Sequence[Words],
    line: Line,
    composer: Composer,
    *,
    dry_run: bool = False,
    retry_failed: bool = False,
    search: Searching | None = None,
) -> int:
    """Run these members, each `line.base` with words of its own, and what `search` adds to them.

    What is done stays done. Returns 0 where all are done, 75 where a signal stopped the work, 1
    where any failed.
    """
    ledger = Ledger(folder_of(line))
    if search is not None and search.proposes:
        search.require_own_folder(ledger)
        members = search.to_come(ledger) if dry_run else members
    planned = plan(members, line, composer)
    told = plan(search.examples, line, composer) if search and search.proposes else planned
    check(line.sweep, told)
    line = dataclasses.replace(line, sweep=for_members(line.sweep, told))
    if dry_run:
        at_once = len(process.slots(line.sweep.jobs, process.visible_gpus()))
        workers = 1 if line.sweep.launcher == "local" else line.sweep.workers
        cost.show(listed(planned, ledger), ledger, at_once * workers)
        return 0
    more = adder(search, ledger, line, composer)
    ids = None if more else {p.id for p in planned}
    with ledger.locked():
        begin(ledger, line, composer, is_searched=more is not None)
        add(planned, ledger)
        if retry_failed:
            retry(ids, ledger)
    log_to(ledger.folder / LOG)

    is_finished = more is None and all(m.state in ENDED for m in members_of(ledger, ids))
    if line.sweep.launcher != "local" and not is_finished:
        from peftcli.sweep import launchers

        was_stopped = launchers.run(ledger, line.sweep, ids)
        code = conclude(ledger, ids, was_stopped=was_stopped)
    else:
        code = work(ledger, line.sweep, ids, more, search.hopeless if search else None)
    if search is not None:
        search.report(ledger)
    return code


def check(settings: Sweep, planned: Sequence[Planned]) -> None:
    """Refuse a line of which no member can be composed, since it is the line that is wrong; to
    judge runs that are not evaluated while they train; to report on the data of tuning.
    """
    cfgs = [p.cfg for p in planned if p.cfg is not None]
    if planned and not cfgs:
        more = f" Of {len(planned)} members none can be run." if len(planned) > 1 else ""
        raise ConfigError(f"{planned[0].reason}{more}")
    if settings.prune != "none" and any(not cfg.trainer.eval_steps for cfg in cfgs):
        raise ConfigError(
            f"sweep.prune={settings.prune}: judges runs by their evaluations while they train; "
            "set trainer.eval_steps=N, too."
        )
    other = settings.report_on.items()
    if other and any(all(OmegaConf.select(cfg, k) == v for k, v in other) for cfg in cfgs):
        raise ConfigError("sweep.report_on: is what the settings are tuned on; name other data.")


def join(folder: Path, jobs: int | None, stop_file: str | None) -> int:
    """`peft-train sweep-worker`: work on a sweep that was planned elsewhere, until the file of
    this name appears in its folder.
    """
    ledger = Ledger(folder.absolute())
    head = ledger.head()
    os.chdir(head["folder"])  # where the line was given; its paths may be relative
    settings = Sweep(**{**head["sweep"], **({"jobs": jobs} if jobs else {})})
    log_to(ledger.folder / LOG)
    more = hopeless = None
    if head["is_searched"] or settings.prune != "none":  # else there is nothing to compose
        composer = Composer([Path(p) for p in head["config_dirs"]], head["config_name"])
        line = composer.read(head["line"])
        search = searching(line.sweep, line.space, line.given, composer.config_dirs)
        more = adder(search, ledger, line, composer)
        hopeless = search.hopeless
    stop = ledger.folder / stop_file if stop_file else None
    return work(ledger, settings, None, more, hopeless, stop)


def adder(
    search: Searching | None, ledger: Ledger, line: Line, composer: Composer
) -> Callable[[], bool] | None:
    """What asks a search for further members and plans them; None where all are planned."""
    if search is None or not search.proposes:
        return None

    def add_more() -> bool:
        with ledger.locked():
            return add(plan(search.propose(ledger), line, composer), ledger)

    return add_more


def work(
    ledger: Ledger,
    settings: Sweep,
    ids: set[str] | None,
    more: Callable[[], bool] | None = None,
    hopeless: Hopeless | None = None,
    stop_file: Path | None = None,
) -> int:
    """Work in this process until all members have ended; the exit code of the sweep. `more` plans
    further members when none waits; `hopeless` is asked about each that runs.
    """
    mine = members_of(ledger, ids)
    if not more and all(m.state in ENDED for m in mine):
        return conclude(ledger, ids, was_stopped=False)
    process.warm_up()
    shares = process.slots(settings.jobs, process.visible_gpus())
    screen = board.Board(len(mine))
    worker = Worker(ledger, settings, shares, screen, ids, more, hopeless, stop_file)
    worker.work()
    return conclude(ledger, ids, was_stopped=worker.was_stopped)


def conclude(ledger: Ledger, ids: set[str] | None, *, was_stopped: bool) -> int:
    """Say how the members stand; the exit code."""
    mine = members_of(ledger, ids)
    board.report(mine, ledger)
    if was_stopped:
        return Stopped.exit_code
    if any(m.state == "failed" for m in mine):
        return 1
    return Stopped.exit_code if any(m.state not in ENDED for m in mine) else 0


def members_of(ledger: Ledger, ids: set[str] | None) -> list[Member]:
    """The members with these ids; all for None."""
    return [m for m in ledger.members() if ids is None or m.id in ids]


# -- Planning --------------------------------------------------------------------------------------
def folder_of(line: Line) -> Path:
    """The line's folder: the one that it names, or the newest of the same line, or a new one."""
    if line.folder_is_given:
        return line.folder
    for path in sorted(line.folder.parent.glob(f"*/{FILE}"), reverse=True):
        if read_json(path).get("identity") == line.identity:
            say(f"going on with the same line's sweep in {folders.shown(path.parent)}", "cyan")
            return path.parent
    return line.folder


def plan(members: Sequence[Words], line: Line, composer: Composer) -> list[Planned]:
    """Every member composed and checked, each run once; with `sweep.match_parameters`, at the size
    at which so many parameters train.
    """
    base, found = line.base, dict[str, Planned]()
    sizes = None
    if line.sweep.match_parameters:
        from peftcli.sweep.match import sizes_for

        sizes = sizes_for(line.sweep.match_parameters)
    for words in members:
        unmade_id = id_of_words([*base, *words])
        try:
            id, cfg = composer.member([*base, *words])
            if sizes:
                id, cfg = composer.member([*base, *words, sizes(cfg)])
            made = Planned(id, words, unmade_id, cfg)
        except UserError as e:
            reason = process.one_line(str(e))
            made = Planned(unmade_id, words, unmade_id, None, reason, e.exit_code)
        found.setdefault(made.id, made)
    return list(found.values())


def for_members(settings: Sweep, planned: Sequence[Planned]) -> Sweep:
    """The settings, with one member at a time where `auto` meets members of several processes,
    which take all GPUs.
    """
    several = any(p.cfg is not None and p.cfg.strategy.name != "single" for p in planned)
    return (
        dataclasses.replace(settings, jobs=1) if several and settings.jobs == "auto" else settings
    )


def begin(ledger: Ledger, line: Line, composer: Composer, *, is_searched: bool) -> None:
    """What sweep.json says of the line; when it was begun stays."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    before = ledger.head() if ledger.exists() else {}
    ledger.begin(
        {
            "line": line.given,
            "keys": line.space.keys,
            "created_at": before.get("created_at", now),
            "versions": versions(),
            "identity": line.identity,
            "sweep": dataclasses.asdict(line.sweep),
            "is_searched": is_searched,  # members are planned while it runs
            "config_dirs": [str(p.absolute()) for p in composer.config_dirs],
            "config_name": composer.config_name,
            "folder": str(Path.cwd()),
        }
    )


def listed(planned: Sequence[Planned], ledger: Ledger) -> list[Member]:
    """The members as the ledger has them, and, of those that are new, as they would begin."""
    before = {m.id: m for m in ledger.members()}
    last = max((m.number for m in before.values()), default=0)
    fresh = [p for p in planned if p.id not in before]
    made = {
        p.id: Member(
            p.id,
            last + i,
            p.words,
            state="waiting" if p.cfg is not None else "failed",
            exit_code=p.exit_code,
            reason=p.reason,
        )
        for i, p in enumerate(fresh, 1)
    }
    return [before.get(p.id) or made[p.id] for p in planned]


def add(planned: Sequence[Planned], ledger: Ledger) -> bool:
    """Give the members that are new their folders; whether there are any. Under the lock."""
    for unmade in {p.unmade_id for p in planned if p.cfg is not None}:
        ledger.forget(unmade)
    members = [m for m in listed(planned, ledger) if ledger.member(m.id) is None]
    by_id = {p.id: p for p in planned}
    for member in members:
        cfg, run_dir = by_id[member.id].cfg, ledger.run_dir(member.id)
        if cfg is not None:
            cfg.run_dir = str(run_dir)
            config.save(cfg, run_dir)
            (run_dir / ".hydra").mkdir(exist_ok=True)
            OmegaConf.save(list(member.overrides), run_dir / ".hydra" / "overrides.yaml")
        ledger.write(member)
    return bool(members)


def retry(ids: set[str] | None, ledger: Ledger) -> None:
    """Let failed members wait again."""
    for member in members_of(ledger, ids):
        if member.state == "failed" and (ledger.run_dir(member.id) / config.FILE).exists():
            ledger.write(member, state="waiting")
