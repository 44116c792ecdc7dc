"""Rules that stop runs which will not be the best."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest

from peftcli.settings import Sweep
from peftcli.sweep import foretelling, pruning
from peftcli.sweep.ledger import Trial
from peftcli.sweep.objective import Objective
from peftcli.sweep.pruning import Curve, Seen, Stop
from peftcli.sweep.results import Results

ACCURACY, LOSS = Objective(("accuracy",), (1,)), Objective(("loss",), (-1,))
MEDIAN = Sweep(prune="median", prune_after=3)
PREDICT = Sweep(prune="predict")


def named(*, control: bool) -> tuple[str, ...]:
    """Overrides of a run that is, or is not, one of the controls."""
    found = ((f"a={i}",) for i in range(1000) if pruning.is_control((f"a={i}",)) == control)
    return next(found)


FREE, CONTROL = named(control=False), named(control=True)


def curve(*values: float) -> Curve:
    return {10 * i: value for i, value in enumerate(values, 1)}


def hopeless(
    sweep: Sweep, goal: Objective, name: tuple[str, ...], so_far: Curve, others: list[Curve]
) -> str | None:
    """The reason, of runs of which only curves are known."""
    found = pruning.hopeless(sweep, goal, name, Seen(so_far), list(map(Seen, others)))
    return found.reason if found else None


OTHERS = [curve(0.5, 0.6, 0.7), curve(0.4, 0.7, 0.8), curve(0.3, 0.65, 0.9)]


def test_a_run_below_the_median_of_the_others_is_hopeless() -> None:
    reason = hopeless(MEDIAN, ACCURACY, FREE, curve(0.39), OTHERS)
    assert reason == "hopeless: accuracy 0.39 by step 10, the median of 3 runs is 0.4"
    assert hopeless(MEDIAN, ACCURACY, FREE, curve(0.4), OTHERS) is None
    assert hopeless(MEDIAN, ACCURACY, FREE, curve(0.66, 0.1), OTHERS) is None  # by its best


def test_of_a_loss_the_decisions_are_mirrored() -> None:
    others = [{s: -v for s, v in c.items()} for c in ({10: 1.0, 20: 0.5}, {10: 2.0, 20: 0.6})]
    rule = Sweep(prune="median", prune_after=2)
    assert hopeless(rule, LOSS, FREE, {10: -1.4}, others) is None
    reason = hopeless(rule, LOSS, FREE, {10: -1.6}, others)
    assert reason == "hopeless: loss 1.6 by step 10, the median of 2 runs is 1.5"


@pytest.mark.parametrize(
    ("sweep", "name", "so_far", "others"),
    [
        (Sweep(), FREE, curve(0.1), OTHERS),  # no rule
        (MEDIAN, CONTROL, curve(0.1), OTHERS),
        (MEDIAN, FREE, curve(0.1), OTHERS[:2]),  # too few others
        (MEDIAN, FREE, curve(0.1, 0.1, 0.1), OTHERS),  # at its end
        (MEDIAN, FREE, {5: 0.1}, OTHERS),  # others were not evaluated there
        (MEDIAN, FREE, {}, OTHERS),
        (Sweep(prune="median", prune_after=3, prune_from=0.5), FREE, curve(0.1), OTHERS),
        (PREDICT, FREE, curve(0.1), OTHERS * 6),  # 18 of 20
    ],
)
def test_nothing_is_stopped_too_early(
    sweep: Sweep, name: tuple[str, ...], so_far: Curve, others: list[Curve]
) -> None:
    assert hopeless(sweep, ACCURACY, name, so_far, others) is None


def test_controls_tell_how_often_the_rule_would_have_been_wrong() -> None:
    """One control is behind and stays there; one is behind and ends as the best."""
    names = [(f"a={i}",) for i in range(200)]
    first, second = [n for n in names if pruning.is_control(n)][:2]
    free = [n for n in names if not pruning.is_control(n)][:3]
    runs = dict(zip(free, map(Seen, OTHERS), strict=True)) | {
        first: Seen(curve(0.1, 0.2, 0.3)),
        second: Seen(curve(0.1, 0.2, 0.95)),
    }
    assert pruning.wrong_stops(MEDIAN, ACCURACY, runs) == (2, 2, 1)


# -- prediction ------------------------------------------------------------------------------------
def test_features_are_values_and_their_first_and_second_differences() -> None:
    made = foretelling.features([0.10, 0.30, 0.45, 0.55])
    assert made == pytest.approx([0.10, 0.30, 0.45, 0.55, 0.20, 0.15, 0.10, -0.05, -0.05])
    assert len(made) == 3 * 4 - 3
    assert foretelling.features([0.1, 0.3], (1.0, 0.0))[-2:] == (1.0, 0.0)


def test_the_chance_of_staying_behind() -> None:
    assert pruning.chance_of_less(0.80, 0.70, 0.04) == pytest.approx(0.993790, abs=1e-6)
    assert pruning.chance_of_less(0.80, 0.77, 0.04) == pytest.approx(0.773373, abs=1e-6)


def foretold(
    model: str, rows: list[list[float]], final: list[float], row: list[float]
) -> tuple[float, float] | None:
    runs = foretelling.Runs(tuple(map(tuple, rows)), tuple(final))
    found = foretelling.fitted(model, runs)
    return (found.f(tuple(row)), found.deviation) if found else None


def test_an_end_that_is_linear_in_the_curve_is_foretold_exactly() -> None:
    stream = random.Random(0)
    rows = [[stream.random(), 1.0, stream.random()] for _ in range(25)]  # one is constant
    found = foretold("ols", rows, [2 * a - c for a, _, c in rows], [0.5, 1.0, 0.25])
    assert found == pytest.approx((0.75, 0.0), abs=1e-9)


def test_leave_one_out_errors_are_those_of_refitting() -> None:
    stream = random.Random(1)
    rows = [[stream.random(), stream.random()] for _ in range(12)]
    final = [a + stream.gauss(0, 0.1) for a, _ in rows]
    errors = []
    for i, row in enumerate(rows):
        other = foretold("ols", rows[:i] + rows[i + 1 :], final[:i] + final[i + 1 :], row)
        assert other is not None
        errors.append(final[i] - other[0])
    found = foretold("ols", rows, final, rows[0])
    assert found is not None
    assert found[1] == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)))


def test_too_few_runs_foretell_nothing() -> None:
    assert foretold("ols", [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]], [0.0, 1.0, 2.0], [0, 0]) is None


def test_a_nu_svr_foretells_what_is_not_linear_and_the_same_again() -> None:
    stream = random.Random(2)
    rows = [[stream.uniform(-2, 2), 7.0, stream.random()] for _ in range(40)]  # one is constant
    final = [math.sin(2 * a) + 0.5 * c for a, _, c in rows]
    by_svr, by_ols = (foretold(m, rows, final, [0.5, 7.0, 0.5]) for m in ("svr", "ols"))
    assert by_svr is not None
    assert by_ols is not None
    assert by_svr[0] == pytest.approx(math.sin(1.0) + 0.25, abs=0.1)
    assert by_svr[1] < 0.5 * by_ols[1]
    foretelling.fitted.cache_clear()
    foretelling._chosen.cache_clear()
    assert foretold("svr", rows, final, [0.5, 7.0, 0.5]) == by_svr


@pytest.mark.parametrize("model", ["ols", "svr"])
def test_a_place_in_the_space_tells_what_a_curve_does_not(model: str) -> None:
    """All curves begin alike; where the place says that it ends low, the run is stopped."""
    stream, sweep = random.Random(3), Sweep(prune="predict", prune_model=model)  # type: ignore[arg-type]
    finished = []
    for _ in range(40):
        u, start = stream.random(), stream.gauss(0.5, 0.002)
        end = start + 0.4 * u + stream.gauss(0, 0.02)
        finished.append(Seen(curve(start, start, end), (u, 1.0)))
    low, high = (Seen(curve(0.5, 0.5), (u, 1.0)) for u in (0.2, 1.0))
    stop = pruning.judged(sweep, ACCURACY, low, finished)
    assert stop is not None
    assert stop.foretold == pytest.approx(0.58, abs=0.03)
    assert re.fullmatch(
        r"hopeless: accuracy 0\.5\d* \+- 0\.0\d+ foretold at step 20, "
        r"the best of 40 runs has 0\.\d+",
        stop.reason,
    )
    assert pruning.judged(sweep, ACCURACY, high, finished) is None
    mirrored = pruning.judged(sweep, LOSS, low, finished)
    assert mirrored is not None
    assert mirrored.foretold == stop.foretold
    assert mirrored.reason == stop.reason.replace("accuracy ", "loss -").replace("has ", "has -")


def test_a_search_is_told_what_was_foretold_and_the_best_is_measured() -> None:
    results = Results()
    for name, state, value, foretold in (
        ("a=1", "done", 0.5, None),
        ("a=2", "pruned", None, 0.9),
        ("a=3", "failed", None, None),
        ("a=4", "pruned", None, None),  # by the median: nothing was foretold
    ):
        metrics = {} if value is None else {"accuracy": value}
        results.note((name,), None, Trial((name,), state, metrics, 1.0, foretold), ACCURACY)
    told = {("a=1",): (0.5,), ("a=2",): (0.9,), ("a=3",): (0.5,), ("a=4",): (0.5,)}
    assert results.tried == told
    assert results.best == [("a=1",)]
    assert Stop("why").foretold is None


@pytest.mark.parametrize(
    ("rule", "model"), [("median", "ols"), ("predict", "ols"), ("predict", "svr")]
)
def test_a_sweep_keeps_its_best_run_and_takes_fewer_steps(rule: str, model: str) -> None:
    """60 runs y = a (1 - exp(-b t)) with noise of 0.003, evaluated ten times."""
    stream, sweep = random.Random(0), Sweep(prune=rule, prune_model=model, prune_after=5)
    finished: list[Curve] = []
    steps, best, kept = 0, 0.0, 0.0
    for i in range(60):
        a, b = stream.uniform(0.5, 0.9), stream.uniform(0.2, 0.6)
        ts = range(1, 11)
        whole = curve(*(a * (1 - math.exp(-b * t)) + stream.gauss(0, 0.003) for t in ts))
        best = max(best, whole[100])
        seen: dict[int, float] = {}
        for step, value in whole.items():
            seen[step] = value
            steps += 1
            if hopeless(sweep, ACCURACY, (f"run={i}",), seen, finished):
                break
        else:
            finished.append(whole)
            kept = max(kept, whole[100])
    assert kept == best
    assert steps < 480  # of 600


def test_a_curve_is_read_while_its_last_line_is_being_written(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "eval_loss": 3.0},
        {"step": 1, "loss": 2.0},
        {"step": 10, "eval_loss": 1.5, "eval_accuracy": 0.5},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "eval_l'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert pruning.read_curve(tmp_path, LOSS) == {10: -1.5}
    assert pruning.read_curve(tmp_path / "nowhere", LOSS) == {}
