"""Spaces and searches: pure functions of a ledger and a seed."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import pytest

from peftcli.errors import ConfigError
from peftcli.settings import Sweep
from peftcli.sweep import search
from peftcli.sweep.objective import objective
from peftcli.sweep.protocol import Study
from peftcli.sweep.space import Choices, Interval, Space, parse
from tests.sweep.ledgers import Member, go_on, names, sweep, sweep_by_workers

WORDS = (
    "+recipe=lora_llama",
    "method=lora,dora",
    "optimizer.lr=tag(log,interval(1e-5,1e-2))",
    "method.r=range(4,17,4)",
    "trainer.max_steps=3",
)
BRANIN = parse(["x=interval(-5.0,10.0)", "y=interval(0.0,15.0)"])


def branin(given: Mapping[str, str]) -> dict[str, float]:
    x, y = float(given["x"]), float(given["y"])
    value = (y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6) ** 2
    return {"loss": value + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10}


def study(search: str = "random", **given: object) -> Study:
    return Study(Sweep(search=search, metric="loss", **given), BRANIN)


# -- spaces ----------------------------------------------------------------------------------------
def test_a_space_is_the_swept_words_of_a_line() -> None:
    assert parse(WORDS).dimensions == (
        Choices("method", ("lora", "dora")),
        Interval("optimizer.lr", 1e-5, 1e-2, log=True),
        Choices("method.r", ("4", "8", "12", "16")),
    )
    assert parse(["r=int(interval(2,64))"]).dimensions == (Interval("r", 2, 64, integer=True),)
    assert parse(["r=shuffle(range(1,4))"]).dimensions == (Choices("r", ("1", "2", "3")),)


def test_values_are_short_and_stay_between_the_ends() -> None:
    lr = Interval("lr", 1.2344e-5, 1e-2, log=True)
    assert lr.at(0.0) == "1.2344e-05"
    assert lr.at(0.5) == "0.0003513"
    assert float(lr.at(0.999999)) <= 1e-2
    r = Interval("r", 2, 5, integer=True)
    assert [r.at(u) for u in (0.0, 0.26, 0.51, 0.99)] == ["2", "3", "4", "5"]


@pytest.mark.parametrize(
    "dimension",
    [
        Choices("a", ("x", "y", "z")),
        Interval("a", 1, 64, log=True, integer=True),
        Interval("a", 0.0, 1.0),
    ],
)
def test_a_value_s_position_gives_the_value_again(dimension: Choices | Interval) -> None:
    for u in (0.0, 0.2, 0.5, 0.77, 0.99):
        text = dimension.at(u)
        assert dimension.at(dimension.position(text)) == text


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("a=interval(2,1)", "first end"),
        ("a=tag(log,interval(0,1))", "above 0"),
        ("a=tag(lag,interval(1,2))", "lag"),
    ],
)
def test_a_space_that_is_none_is_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse([word])


def test_a_grid_has_all_points_and_no_interval() -> None:
    points = list(parse(["a=1,2", "b=x,y"]).points())
    assert points == [("a=1", "b=x"), ("a=1", "b=y"), ("a=2", "b=x"), ("a=2", "b=y")]
    with pytest.raises(ConfigError, match="a grid needs values"):
        Study(Sweep(), parse(WORDS))


# -- searches --------------------------------------------------------------------------------------
def test_random_points_are_distinct_and_do_not_depend_on_how_many_are_asked_for() -> None:
    space = parse(["a=1,2,3", "b=x,y"])
    order = search.in_order("random", space, 0)
    assert order is not None
    points = list(order)
    assert len(points) == len(set(points)) == 6
    few, other = (search.in_order("random", BRANIN, seed) for seed in (0, 1))
    assert few is not None
    assert other is not None
    assert list(islice(few, 3)) != list(islice(other, 3))


def test_an_interval_of_few_values_is_drawn_to_its_end() -> None:
    order = search.in_order("random", parse(["a=interval(0.1,0.1001)"]), 0)
    assert order is not None
    assert set(order) == {("a=0.1",), ("a=0.1001",)}


def test_an_objective_knows_its_direction_or_asks() -> None:
    assert objective(Sweep(), {"loss", "accuracy"}).names == ("accuracy",)
    assert objective(Sweep(), {"loss"}).scores({"loss": 2.0}) == (-2.0,)
    assert objective(Sweep(metric="x", direction="minimize"), {"x"}).signs == (-1,)
    assert objective(Sweep(metric=("accuracy", "num_trainable_params")), ()).signs == (1, -1)
    with pytest.raises(ConfigError, match=r"sweep\.direction"):
        objective(Sweep(metric="x"), {"x"})
    with pytest.raises(ConfigError, match="Did you mean accuracy"):
        objective(Sweep(metric="acuracy"), ())
    with pytest.raises(ConfigError, match="no such metric"):
        objective(Sweep(metric="f1"), {"accuracy"})
    assert objective(Sweep(), {"loss"}).scores({"loss": math.nan}) is None


def test_tpe_is_better_than_random_on_a_known_function(tmp_path: Path) -> None:
    def regret(kind: str, seed: int) -> float:
        members = sweep(study(kind, trials=40, search_seed=seed), tmp_path, branin)
        assert len(members) == 40
        return min(m.metrics["loss"] for m in members) - 0.397887

    seeds = range(5)
    by_tpe, by_chance = ([regret(kind, s) for s in seeds] for kind in ("optuna", "random"))
    assert sum(by_tpe) < 0.5 * sum(by_chance)


@pytest.mark.parametrize(
    ("kind", "kills"),
    [("random", (1, 5, 11, 13)), ("optuna", (1, 5, 11, 13)), ("metade", (12,))],
)
def test_a_search_killed_after_any_run_goes_on_as_it_would_have(
    kind: str, kills: Sequence[int], tmp_path: Path
) -> None:
    whole = sweep(study(kind, trials=14), tmp_path, branin)
    for killed_after in kills:
        members = sweep(study(kind, trials=14), tmp_path, branin, most=killed_after)
        go_on(study(kind, trials=14), tmp_path, branin, members[::-1])
        go_on(study(kind, trials=14), tmp_path, branin, members)
        assert names(members) == names(whole)


@pytest.mark.parametrize("kind", ["optuna", "metade"])
def test_what_is_proposed_does_not_depend_on_the_ledger_s_order(kind: str, tmp_path: Path) -> None:
    members = sweep(study("random", trials=30), tmp_path, branin)
    forth = search.next_point(kind, BRANIN, _tried(members), 0)
    assert search.next_point(kind, BRANIN, _tried(members[::-1]), 0) == forth


def _tried(members: list[Member]) -> search.Tried:
    return {m.overrides: (-m.metrics["loss"],) for m in members}


def test_workers_share_a_search_and_no_point_is_tried_twice(tmp_path: Path) -> None:
    for seed in (0, 1):
        members = sweep_by_workers(study("optuna", trials=20), tmp_path, branin, 4, seed)
        assert len(set(names(members))) == len(members) == 20
        assert {m.state for m in members} == {"done"}


def test_failures_count_as_the_worst_and_a_small_space_ends(tmp_path: Path) -> None:
    space = parse(["a=1,2,3,4", "b=x,y,z"])

    def half_fails(given: Mapping[str, str]) -> dict[str, float] | None:
        return None if given["b"] == "x" else {"accuracy": float(given["a"])}

    members = sweep(Study(Sweep(search="optuna", trials=50), space), tmp_path, half_fails)
    assert len(set(names(members))) == 12
    assert sum(m.state == "failed" for m in members) == 4


def test_several_metrics_give_a_pareto_front(tmp_path: Path) -> None:
    space = parse(["method.r=1,2,4,8,16,32", "b=x,y"])
    given = Sweep(search="optuna", trials=12, metric=("accuracy", "num_trainable_params"))

    def run(g: Mapping[str, str]) -> dict[str, float]:
        r = float(g["method.r"])
        gain = 1.0 if g["b"] == "x" else 0.5
        return {"accuracy": gain * min(r, 8.0), "num_trainable_params": r}

    plan = Study(given, space)
    members = sweep(plan, tmp_path, run)
    best = {p for results in plan.tuned(members) for p in results.best}
    assert best == {(f"method.r={r}", "b=x") for r in (1, 2, 4, 8)}


@pytest.mark.parametrize(
    ("module", "key", "value"),
    [
        ("optuna", "search", "optuna"),
        ("sklearn", "search", "metade"),
        ("sklearn", "prune_model", "svr"),
    ],
)
def test_where_a_library_is_missing_its_extra_is_named_before_anything_runs(
    module: str, key: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    given = {"search": "random", "prune": "predict", key: value}
    with pytest.raises(ConfigError, match=rf"sweep.{key}={value} .* 'peftcli\[{module}\]'"):
        study(**given)


def test_an_empty_space_has_one_point() -> None:
    assert list(Space(()).points()) == [()]
    assert Space(()).size == 1
