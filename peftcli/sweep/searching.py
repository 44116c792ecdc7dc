"""A search at work in a sweep folder: what it asks of the ledger, and what it says at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from peftcli import folders
from peftcli.errors import ConfigError, did_you_mean
from peftcli.screen import facts, say
from peftcli.settings import Sweep
from peftcli.sweep import incumbent, pruning, report
from peftcli.sweep.encoding import traits_of
from peftcli.sweep.ledger import Ledger, Member
from peftcli.sweep.objective import Objective
from peftcli.sweep.protocol import Cell, Study
from peftcli.sweep.space import Point, Space, values_of
from peftcli.train.folder import write_json
from peftcli.traits import family

FILE = "protocol.json"


@dataclass
class Searching:
    """A study and the folder's state as far as it was read; the state is a cache and no more."""

    study: Study
    given: Sequence[str]  # the line
    sizes: dict[str, int] = field(default_factory=dict)  # of what running members have written
    seen: dict[str, pruning.Seen] = field(default_factory=dict)  # of finished members

    @property
    def proposes(self) -> bool:
        """Whether members are planned while the sweep runs."""
        return self.study.sweep.search != "grid" or bool(self.study.sweep.tuning_seeds)

    @property
    def examples(self) -> list[Point]:
        """The settings of a run of each thing that is compared, and further ones of the first."""
        cells = self.study.cells
        places = [*((cell, 0.0) for cell in cells), (cells[0], 0.5), (cells[0], 0.99)]
        return [(*c.fixed, *c.space.at([u] * len(c.space.dimensions))) for c, u in places]

    def propose(self, ledger: Ledger) -> list[Point]:
        """Members to plan now. Under the folder's lock."""
        return incumbent.propose(self.study, ledger.folder, ledger.trials())

    def require_own_folder(self, ledger: Ledger) -> None:
        """Refuse a folder in which another search was tested."""
        incumbent.frozen_for(self.study, ledger.folder)

    def to_come(self, ledger: Ledger) -> list[Point]:
        """Members planned so far, and the tuning runs that would be planned next."""
        planned = [m.overrides for m in ledger.members()]
        return [*planned, *self.study.to_tune(self.study.tuned(ledger.trials()))]

    def hopeless(self, ledger: Ledger, member: Member) -> pruning.Stop | None:
        """Why a running member need not go on; looked at when it has written something."""
        sweep, run_dir = self.study.sweep, ledger.run_dir(member.id)
        if sweep.prune == "none" or not self._has_news(member, run_dir):
            return None
        cell = self.study.cell_of(member.overrides)
        if cell is None:
            return None
        goal = self.study.objective(ledger.trials())
        run = self._seen(member, cell, run_dir, goal)
        finished = list(self._finished(ledger, cell, goal).values())
        return pruning.hopeless(sweep, goal, member.overrides, run, finished) if run else None

    def report(self, ledger: Ledger) -> None:
        """Say what came out; write the protocol's record once the test runs have ended."""
        trials = ledger.trials()
        if self.study.sweep.prune != "none":
            self._report_pruning(ledger)
        found = report.results(self.study, ledger.folder, trials)
        blocks = report.blocks(found)
        if self.proposes and not found:
            blocks = report.best_so_far(self.study, trials)
        for setting, told in blocks:
            facts(setting, told)
        if found:
            record = report.checklist(self.study, ledger.folder, trials, self.given)
            write_json(ledger.folder / FILE, record)

    def _report_pruning(self, ledger: Ledger) -> None:
        """What the rule did, and what it would have done to the controls."""
        goal, members = self.study.objective(ledger.trials()), ledger.members()
        totals = [0, 0, 0]
        for cell in self.study.cells:
            runs = self._finished(ledger, cell, goal)
            found = pruning.wrong_stops(self.study.sweep, goal, runs)
            totals = [a + b for a, b in zip(totals, found, strict=True)]
        pruned = sum(m.state == "pruned" for m in members)
        say(f"sweep.prune={self.study.sweep.prune}: {pruned} of {len(members)} runs stopped")
        controls, stopped, wrong = totals
        if controls:
            of_them = f"{stopped}, {wrong} of them the best"
            say(f"  of {controls} controls it would have stopped {of_them}")

    def _has_news(self, member: Member, run_dir: Path) -> bool:
        path = run_dir / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size == self.sizes.get(member.id, 0):
            return False
        self.sizes[member.id] = size
        return True

    def _finished(self, ledger: Ledger, cell: Cell, goal: Objective) -> dict[Point, pruning.Seen]:
        """What is seen of the finished tuning runs of a cell, each read once."""
        found = {}
        for m in ledger.members():
            if m.state != "done" or self.study.cell_of(m.overrides) != cell:
                continue
            seen = self.seen.get(m.id) or self._seen(m, cell, ledger.run_dir(m.id), goal)
            if seen is not None:
                found[m.overrides] = self.seen[m.id] = seen
        return found

    def _seen(
        self, member: Member, cell: Cell, run_dir: Path, goal: Objective
    ) -> pruning.Seen | None:
        """None for a run of another space that the folder had before."""
        point = cell.space.point_in(values_of(member.overrides))
        if point is None:
            return None
        return pruning.Seen(pruning.read_curve(run_dir, goal), traits_of(cell.space, point))


def searching(
    sweep: Sweep, space: Space, given: Sequence[str], config_dirs: Sequence[Path]
) -> Searching:
    """The search that a line asks for.

    Raises:
        ConfigError: its keys do not go together.
    """
    families = {name: family(t) for name, t in folders.targets("method", config_dirs).items()}
    known = {*families, *families.values()}
    for name in sweep.lr_scale:
        if name not in known:
            raise ConfigError(
                f"sweep.lr_scale.{name}: is no method and no family of methods."
                f"{did_you_mean(name, known)} `peft-train methods` lists them."
            )
    return Searching(Study(sweep, space, lambda method: families.get(method, "")), given)
