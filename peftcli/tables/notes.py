"""What must be said beneath a table: how values were chosen, what runs share, what was left out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from peftcli.tables.cells import Cell, Plan
from peftcli.tables.protocol import facts, is_protocol, is_tuned, same, short
from peftcli.tables.render import PLUS_MINUS
from peftcli.tables.runs import RunRecord
from peftcli.tables.statistics import RESAMPLES


def notes(
    runs: Sequence[RunRecord],
    cells: Sequence[Cell],
    doubles: Sequence[RunRecord],
    plan: Plan,
    tuned: Sequence[str],
    paired: str | None,
) -> Iterator[str]:
    """Sentences, the most needed first."""
    yield _values(cells, plan)
    if tuned:
        yield from _choice(cells, plan, tuned)
    if paired is not None:
        shared = "columns and seeds" if plan.columns else "seeds"
        yield (
            f"minus {paired}: mean difference on equal {shared} with its 95 % bootstrap interval;"
            " p of the two-sided sign-flip test, at least 2/2^pairs."
        )
    reported = [run for cell in cells for run in cell.runs]
    yield from _other_data(runs, plan)
    yield from _common(reported)
    yield from _unequal(reported, plan, tuned)
    if doubles:
        listed = ", ".join(run.name for run in doubles)
        yield f"left out, since a newer run has the same values and seed: {listed}."


def _values(cells: Iterable[Cell], plan: Plan) -> str:
    seeds = sorted({run.seed for cell in cells for run in cell.runs if run.seed is not None})
    what = (
        "interquartile mean [95 % interval]"
        if plan.how == "iqm"
        else f"mean {PLUS_MINUS} sample standard deviation"
    )
    return (
        f"{plan.metric}: {what} over seeds {_listed(seeds)}; bold where the 95 % bootstrap interval"
        f" ({RESAMPLES:,} resamples) of the best overlaps no other."
    )


def _choice(cells: Sequence[Cell], plan: Plan, tuned: Sequence[str]) -> Iterator[str]:
    """How the values of tuned keys were chosen, cells with tuning seeds apart from others."""
    keys = ", ".join(tuned)
    chosen_apart = [cell for cell in cells if cell.tuning]
    on_reported = [cell for cell in cells if not cell.tuning and cell.tried > 1]
    if chosen_apart:
        seeds = sorted({r.seed for c in chosen_apart for r in c.tuning if r.seed is not None})
        tried = _range(cell.tried for cell in chosen_apart)
        yield (
            f"{keys}: the best of {tried} by the mean {plan.metric} on {_count(seeds)}, which"
            f" {'is' if len(seeds) == 1 else 'are'} not reported; tuning gap: how much better it"
            " was there."
        )
    if on_reported:
        seeds = sorted({r.seed for c in on_reported for r in c.runs if r.seed is not None})
        tried = _range(cell.tried for cell in on_reported)
        word = "seed" if len(seeds) == 1 else "seeds"
        yield (
            f"{keys}: the best of {tried} by the mean {plan.metric} on the same {word} that"
            f" {'is' if len(seeds) == 1 else 'are'} reported ({_listed(seeds)}), which flatters"
            " it; tuning seeds of their own would not (--tuning-seeds)."
        )
    short_of = [cell for cell in cells if any(_did_not_compete(run, cell) for run in cell.waiting)]
    if short_of:
        places = ", ".join(short(v) for cell in short_of for v in cell.row[:1])
        yield f"values with failed or fewer seeds did not compete in: {places}."


def _did_not_compete(run: RunRecord, cell: Cell) -> bool:
    return any(run.keys.get(key) != value for key, value in cell.chosen.items())


def _other_data(runs: Sequence[RunRecord], plan: Plan) -> Iterator[str]:
    """Keys of the protocol in which tuning runs all differ from reported ones."""
    tuning, reported = ([r for r in runs if of(r)] for of in (plan.tunes, plan.reports))
    for key in sorted({key for run in tuning for key in run.keys if is_protocol(key)}):
        theirs, ours = ({same(r.keys.get(key)) for r in some} for some in (tuning, reported))
        if ours and not theirs & ours:
            yield f"tuning runs have {key}={', '.join(theirs)}, reported ones {', '.join(ours)}."


def _common(runs: Sequence[RunRecord]) -> Iterator[str]:
    """What all reported runs share, and their hardware where they do not share that."""
    names = ("model.sha256", "dataset.sha256", "dtype", "versions.torch", "versions.transformers")
    listed = []
    for name in names:
        found = {same(v): v for run in runs if (v := facts(run).get(name)) is not None}
        if len(found) == 1:
            text = str(next(iter(found.values())))
            listed.append(f"{name} {text[:12] if name.endswith('sha256') else text}")
    if listed:
        yield f"all runs: {', '.join(listed)}."
    devices = {str(run.meta_info.get("system_info", {}).get("device")) for run in runs}
    if len(devices) > 1:
        yield f"time, memory and tokens/s are of different devices: {'; '.join(sorted(devices))}."


def _unequal(runs: Sequence[RunRecord], plan: Plan, tuned: Collection[str]) -> Iterator[str]:
    """Settings that rows have of their own though nobody searched for them; a method's apart."""
    shown = {*plan.keys, *tuned}
    keys = {key for run in runs for key in run.keys if is_tuned(key) and "." in key} - shown
    for key in sorted(key for key in keys if not key.startswith("method.")):
        values = {same(run.keys[key]): run.keys[key] for run in runs if key in run.keys}
        if len(values) > 1:
            listed = ", ".join(map(short, values.values()))
            yield f"rows differ in {key}, which was not tuned: {listed}."


def _count(seeds: Sequence[int]) -> str:
    """Tuning on one seed overfits to it, so one is said to be one."""
    one = "1 tuning seed only" if len(seeds) == 1 else f"{len(seeds)} tuning seeds"
    return f"{one} ({_listed(seeds)})"


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds)) or "-"


def _range(values: Iterable[int]) -> str:
    found = sorted(values)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]} to {found[-1]}"
