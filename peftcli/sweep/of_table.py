"""`peft-train -m +table=NAME`: the runs of a published table as the members of a sweep."""

from __future__ import annotations

import argparse
from dataclasses import replace

from peftcli import hydra_app
from peftcli.errors import ConfigError
from peftcli.settings import Sweep
from peftcli.sweep import engine
from peftcli.sweep.line import Composer
from peftcli.tables.paper import asked_of, cells, key_of, read


def main(args: argparse.Namespace) -> int:
    """Every cell of the table that a run can fill, for each choice on the line (`seed=0,1,2`).

    Other words are put over those of the cells: `dataset.path=FOLDER`, `trainer.max_steps=10`.
    """
    asked, words = asked_of(args.overrides)
    paper = asked.of(read(asked.name, args.config_dirs))
    if not any(key_of(word) == "name" for word in words):
        words = [f"name={asked.name}", *words]
    composer = Composer(args.config_dirs, args.config_name)
    line = composer.read(words)
    _refuse_search(line.sweep)
    cells_of = [cells(paper, [*line.base, *chosen]) for chosen in line.grid]
    members = [
        tuple(hydra_app.normalised([w for w in cell if w not in line.base], args.config_dirs))
        for some in cells_of
        for cell in some
    ]
    line = replace(line, given=tuple(args.overrides))
    return engine.run(members, line, composer, dry_run=args.dry_run, retry_failed=args.retry_failed)


def _refuse_search(sweep: Sweep) -> None:
    """Raise `ConfigError` for what would choose runs: a table's are its cells."""
    for key in ("search", "tuning_seeds", "prune"):
        if getattr(sweep, key) != getattr(Sweep(), key):
            raise ConfigError(
                f"sweep.{key}: chooses what is run, and a published table has its cells. Leave it "
                "out, or search by a line of your own with the words of a cell."
            )
