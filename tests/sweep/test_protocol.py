"""Tuning and test seeds, budgets, rungs and races, on ledgers without processes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from peftcli.errors import ConfigError
from peftcli.settings import Sweep
from peftcli.sweep import incumbent, report, seeds
from peftcli.sweep.protocol import Study
from peftcli.sweep.results import Results
from peftcli.sweep.searching import searching
from peftcli.sweep.space import parse, values_of
from tests.sweep.ledgers import Member, go_on, names, sweep

LINE = ["method=lora,dora", "optimizer.lr=1e-4,3e-4,1e-3"]
SPACE = parse(LINE)
PROTOCOL = {"tuning_seeds": (0, 1, 2), "test_seeds": (10, 11, 12, 13)}
OTHER = {"dataset.path": "tweets"}
SKILL = {"0.0001": 0.5, "0.0003": 0.8, "0.001": 0.6}


def run(given: Mapping[str, str]) -> dict[str, float]:
    """The second rate is the best; test examples are 0.1 harder; a seed moves it by thousandths."""
    easier = 0.1 if given.get("dataset.eval_part") == "tuning" else 0.0
    bonus = 0.05 if given.get("method") == "dora" else 0.0
    return {"accuracy": SKILL[given["optimizer.lr"]] + easier + bonus + int(given["seed"]) / 1000}


def of_stage(members: list[Member], part: str) -> list[Member]:
    return [m for m in members if f"dataset.eval_part={part}" in m.overrides]


# -- the checks of a protocol ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "words", "said"),
    [
        ({"tuning_seeds": (0, 1), "test_seeds": (1, 2)}, LINE, r"\[1\] are in sweep.tuning_seeds"),
        ({"tuning_seeds": (0, 0)}, LINE, "twice"),
        ({"test_seeds": (1,)}, LINE, "give sweep.tuning_seeds"),
        ({"tuning_seeds": (0,)}, [*LINE, "seed=0,1"], "not searched over"),
        ({"search": "random"}, [*LINE, "seed=0,1"], "not searched over"),
        ({"search": "random"}, ["method=lora,dora"], "nothing to search"),
        ({"trials": 3}, LINE, "a grid tries everything"),
        ({"seed_order": "race"}, LINE, "several tuning_seeds"),
        ({"compare": ("methd",)}, LINE, "Did you mean method"),
        ({"lr_scale": {"lora": 2.0}}, ["method=lora,dora"], "sweep both"),
        (PROTOCOL, [*LINE, "dataset.eval_part=tuning,report"], "leave it out"),
        ({"report_on": OTHER}, LINE, "give these, too"),
        (PROTOCOL | {"report_on": {"seed": 3}}, LINE, "names no other data"),
        (PROTOCOL | {"report_on": OTHER}, [*LINE, "dataset.path=a,b"], "is swept"),
    ],
)
def test_a_protocol_that_reports_no_test_number_is_refused(
    given: dict, words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Study(Sweep(**given), parse(words))


def test_a_tuning_run_on_the_reported_examples_is_refused() -> None:
    seen = Member(("method=lora", "optimizer.lr=0.001", "seed=0", "dataset.eval_part=report"))
    with pytest.raises(ConfigError, match="must not see"):
        Study(Sweep(**PROTOCOL), SPACE).tuned([seen])


def test_the_objective_is_the_mean_over_tuning_seeds_and_a_failure_is_the_worst(
    tmp_path: Path,
) -> None:
    scores = {"1": (0.8, 0.9, 1.0), "2": (0.9, 0.9, 0.9), "3": (1.0, None, 1.0)}

    def of(given: Mapping[str, str]) -> dict[str, float] | None:
        value = scores[given["a"]][int(given["seed"])]
        return None if value is None else {"accuracy": value}

    study = Study(Sweep(tuning_seeds=(0, 1, 2)), parse(["a=1,2,3"]))
    members = sweep(study, tmp_path, of)
    (results,) = study.tuned(members)
    assert results.mean(("a=1",)) == pytest.approx((0.9,))
    assert results.mean(("a=3",)) is None
    assert results.tried[("a=3",)] == pytest.approx((0.9,))
    assert results.best[0] in {("a=1",), ("a=2",)}


def test_the_best_are_frozen_run_on_every_test_seed_and_alone_reported(tmp_path: Path) -> None:
    study = Study(Sweep(**PROTOCOL), SPACE)
    members = sweep(study, tmp_path, run)
    tuning, test = of_stage(members, "tuning"), of_stage(members, "report")
    assert len(tuning) == 2 * 3 * 3
    assert len(test) == 2 * 4
    assert len(set(names(members))) == len(members)
    assert {values_of(m.overrides)["seed"] for m in test} == {"10", "11", "12", "13"}
    frozen = incumbent.read(tmp_path)
    assert frozen is not None
    for chosen, found in zip(
        frozen["incumbents"], report.results(study, tmp_path, members), strict=True
    ):
        assert "optimizer.lr=0.0003" in chosen["overrides"]
        assert found.sha256 == chosen["sha256"]
        assert found.test_seeds == (10, 11, 12, 13)
        assert found.gap["accuracy"] == pytest.approx(0.1 + 0.001 - 0.0115)
        assert found.test_std["accuracy"] == pytest.approx(0.00129099, rel=1e-4)
    setting, told = report.blocks(report.results(study, tmp_path, members))[0]
    assert setting == "method=lora optimizer.lr=0.0003"
    assert told == {
        "test": "accuracy 0.8115 +- 0.0013  (4 of 4 test seeds)",
        "tuning": "accuracy 0.9010  (mean of 3 seeds, best of 3)",
        "gap": "accuracy +0.0895",
    }


def test_settings_are_tuned_on_one_data_set_and_reported_on_another(tmp_path: Path) -> None:
    study = Study(Sweep(**PROTOCOL, report_on=OTHER), SPACE)
    members = sweep(study, tmp_path, run)
    other = [m for m in members if "dataset.path=tweets" in m.overrides]
    assert (len(members), len(other)) == (2 * 3 * 3 + 2 * 4, 2 * 4)
    assert {values_of(m.overrides)["seed"] for m in other} == {"10", "11", "12", "13"}
    assert not any("eval_part" in word for m in members for word in m.overrides)
    assert "tweets" in report.checklist(study, tmp_path, members, LINE)["separation"]
    seen = Member(("method=lora", "optimizer.lr=0.001", "seed=0", "dataset.path=tweets"))
    with pytest.raises(ConfigError, match="must not see"):
        study.tuned([seen])


def test_what_was_frozen_stays_though_tuning_is_changed_afterwards(tmp_path: Path) -> None:
    study = Study(Sweep(**PROTOCOL), SPACE)
    members = sweep(study, tmp_path, run)
    for member in of_stage(members, "tuning"):
        member.metrics = {"accuracy": 1.0 - member.metrics["accuracy"]}
    assert incumbent.propose(study, tmp_path, members) == []
    other = Study(Sweep(**PROTOCOL), parse([LINE[0], "optimizer.lr=1e-4,3e-4"]))
    with pytest.raises(ConfigError, match="another space"):
        incumbent.propose(other, tmp_path, members)


def test_a_method_whose_runs_all_failed_is_chosen_when_they_are_run_again(tmp_path: Path) -> None:
    def broken(given: Mapping[str, str]) -> dict[str, float] | None:
        return None if given["method"] == "dora" else run(given)

    study = Study(Sweep(**PROTOCOL), SPACE)
    members = sweep(study, tmp_path, broken)
    frozen = incumbent.read(tmp_path)
    assert frozen is not None
    assert [i["cell"] for i in frozen["incumbents"]] == ["method=lora"]
    for member in members:
        member.state = "waiting" if member.state == "failed" else member.state
    go_on(study, tmp_path, run, members)
    again = incumbent.read(tmp_path)
    assert again is not None
    assert again["incumbents"][:1] == frozen["incumbents"]
    assert [i["cell"] for i in again["incumbents"]] == ["method=lora", "method=dora"]
    assert len(of_stage(members, "report")) == 2 * 4


def test_nothing_is_frozen_where_every_run_failed(tmp_path: Path) -> None:
    study = Study(Sweep(**PROTOCOL), SPACE)
    members = sweep(study, tmp_path, lambda given: None)
    assert len(members) == 2 * 3 * 3
    assert incumbent.read(tmp_path) is None


def test_a_record_of_the_protocol_has_no_empty_entry(tmp_path: Path) -> None:
    study = Study(Sweep(**PROTOCOL), SPACE)
    members = sweep(study, tmp_path, run)
    record = report.checklist(study, tmp_path, members, LINE)
    assert [key for key, value in record.items() if value in (None, "", [], {})] == []
    assert json.loads(json.dumps(record))["results"][0]["test_seeds"] == [10, 11, 12, 13]


def test_what_ended_is_not_run_again_whatever_was_killed(tmp_path: Path) -> None:
    study = Study(Sweep(**PROTOCOL, search="random", trials=3), SPACE)
    whole = sweep(study, tmp_path, run)
    for most in (1, 9, 17, 20):
        (tmp_path / incumbent.FILE).unlink()
        members = sweep(study, tmp_path, run, most=most)
        ended = [m for m in members if m.state == "done"]
        before = Counter(names(ended))
        go_on(study, tmp_path, run, members)
        assert names(members) == names(whole)
        assert max(Counter(names(members)).values()) == 1
        assert before.keys() <= set(names(members))


def test_one_tuning_seed_is_told(tmp_path: Path) -> None:
    study = Study(Sweep(tuning_seeds=(0,), test_seeds=(1, 2)), SPACE)
    found = report.results(study, tmp_path, sweep(study, tmp_path, run))
    assert all("(1 seed, best of 3)" in told["tuning"] for _, told in report.blocks(found))


# -- budgets and learning rates --------------------------------------------------------------------
def test_every_method_gets_the_same_number_of_settings_in_a_space_of_its_own_rates(
    tmp_path: Path,
) -> None:
    line = ["method=lora,full", "optimizer.lr=tag(log,interval(1e-4,1e-2))"]
    given = Sweep(search="random", trials=4, tuning_seeds=(0, 1), lr_scale={"selective": 0.1})
    study = Study(given, parse(line), {"lora": "low_rank", "full": "selective"}.__getitem__)
    members = sweep(study, tmp_path, lambda g: {"accuracy": float(g["optimizer.lr"])})
    rates: dict[str, set[float]] = {"lora": set(), "full": set()}
    for member in members:
        values = values_of(member.overrides)
        rates[values["method"]].add(float(values["optimizer.lr"]))
    assert len(rates["lora"]) == len(rates["full"]) == 4
    assert max(rates["full"]) <= 1e-3
    assert min(rates["lora"]) >= 1e-4


def test_a_budget_of_seconds_ends_the_search_of_each_method_alike(tmp_path: Path) -> None:
    line = ["method=lora,dora", "optimizer.lr=tag(log,interval(1e-4,1e-2))"]
    study = Study(Sweep(search="optuna", budget_seconds=5.0, tuning_seeds=(0, 1)), parse(line))
    members = sweep(study, tmp_path, lambda g: {"accuracy": float(g["optimizer.lr"])})
    assert Counter(m.overrides[0] for m in members) == {"method=lora": 6, "method=dora": 6}


def test_budgets_that_are_not_equal_are_refused(tmp_path: Path) -> None:
    study = Study(Sweep(**PROTOCOL), SPACE)
    found = [Results(scores={("optimizer.lr=0.001",): {0: (1.0,)}}), Results()]
    with pytest.raises(ConfigError, match=r"method=lora: 1, method=dora: 0"):
        study.require_equal_budgets(found)


# -- seeds by rungs and races ----------------------------------------------------------------------
def seeds_by_rate(members: list[Member]) -> dict[str, int]:
    return Counter(values_of(m.overrides)["a"] for m in members)


def skilled(given: Mapping[str, str]) -> dict[str, float]:
    return {"accuracy": int(given["a"]) + (int(given["seed"]) * 7 % 5) / 100}


def test_rungs_give_one_seed_to_all_three_to_the_better_half_and_five_to_its(
    tmp_path: Path,
) -> None:
    study = Study(
        Sweep(tuning_seeds=(0, 1, 2, 3, 4), seed_order="rungs"), parse(["a=1,2,3,4,5,6,7,8"])
    )
    members = sweep(study, tmp_path, skilled)
    expected = {"1": 1, "2": 1, "3": 1, "4": 1, "5": 3, "6": 3, "7": 5, "8": 5}
    assert seeds_by_rate(members) == expected
    assert study.tuned(members)[0].best == [("a=8",)]


def test_a_race_drops_what_is_two_standard_errors_behind(tmp_path: Path) -> None:
    study = Study(Sweep(tuning_seeds=(0, 1, 2, 3, 4), seed_order="race"), parse(["a=8,1,2"]))
    members = sweep(study, tmp_path, skilled)
    assert seeds_by_rate(members) == {"8": 5, "1": 2, "2": 2}
    best = [(0.8,), (0.9,), (1.0,)]  # mean 0.9, variance 0.01
    assert seeds.is_behind([(0.7,), (0.7,)], best)  # 0.2 > 2 sqrt(0.01 / 3) = 0.115
    assert not seeds.is_behind([(0.8,), (0.8,)], best)
    assert not seeds.is_behind([(0.1,)], best)  # of one run there is no error


def test_rates_of_what_is_no_method_are_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean lora"):
        searching(Sweep(lr_scale={"lroa": 2.0}), SPACE, LINE, ())
    assert searching(Sweep(lr_scale={"low-rank": 2.0}), SPACE, LINE, ()).study.cells[0].space


@pytest.mark.parametrize("rule", ["rungs", "race"])
def test_a_setting_that_failed_gets_no_further_seed(rule: str, tmp_path: Path) -> None:
    study = Study(Sweep(tuning_seeds=(0, 1, 2), seed_order=rule), parse(["a=1,2,9"]))
    members = sweep(study, tmp_path, lambda g: None if g["a"] == "9" else skilled(g))
    assert seeds_by_rate(members)["9"] == 1
    assert study.tuned(members)[0].best == [("a=2",)]


def test_the_frozen_file_is_read_by_people(tmp_path: Path) -> None:
    study = Study(Sweep(**PROTOCOL), SPACE)
    sweep(study, tmp_path, run)
    text = (tmp_path / incumbent.FILE).read_text()
    assert text.startswith("# The best settings")
    assert yaml.safe_load(text)["incumbents"][0]["num_settings"] == 3
