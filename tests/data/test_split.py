"""The split is a property of the rows, and mixtures keep their weights."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from peftcli.data.records import Record, Text
from peftcli.data.split import half, hold_out, largest_total, shares, without
from peftcli.errors import ConfigError, DataError
from peftcli.settings import Source
from tests.data.conftest import Files, Prepare

Tok = PreTrainedTokenizerBase


def records(texts: list[str]) -> list[Record]:
    """One record a text."""
    return [Record(f"a:{i}", f"a, line {i}", text, Text(text)) for i, text in enumerate(texts)]


def keys(side: list[Record]) -> set[str]:
    """What a side asks."""
    return {r.key for r in side}


TEXTS = [f"text {i}" for i in range(200)]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(), max_size=20), st.integers(0, 3))
def test_with_a_fraction_new_rows_move_no_other(new: list[str], seed: int) -> None:
    before, after = (hold_out(records(t), 0.1, None, seed) for t in (TEXTS, new + TEXTS))
    assert keys(before.train) <= keys(after.train)
    assert keys(before.held_out) <= keys(after.held_out)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(), max_size=20))
def test_with_a_number_nothing_moves_from_training_to_evaluation(new: list[str]) -> None:
    before, after = (hold_out(records(t), 0.1, 40, 0) for t in (TEXTS, new + TEXTS))
    assert keys(after.held_out) <= keys(before.held_out) | set(new)
    assert keys(before.held_out) - keys(after.held_out) <= keys(after.train)
    assert len(after.held_out) == 40


@given(st.lists(st.sampled_from("abcdefgh"), min_size=2), st.integers(1, 8))
def test_no_content_is_on_both_sides_however_often_it_stands(texts: list[str], count: int) -> None:
    for samples in (None, min(count, len(texts))):
        sides = hold_out(records(texts), 0.4, samples, 0)
        assert not keys(sides.train) & keys(sides.held_out)
        assert samples is None or len(sides.held_out) == samples


def test_a_fraction_is_about_that_part_and_the_seed_changes_it() -> None:
    first, second = (hold_out(records(TEXTS), 0.25, None, seed) for seed in (0, 1))
    assert 35 < len(first.held_out) < 65
    assert keys(first.held_out) != keys(second.held_out)


def test_two_halves_have_nothing_in_common_whatever_the_seed_of_the_split() -> None:
    texts = [f"row {i}" for i in range(400)] * 2
    tuning, report = (half(records(texts), part) for part in ("tuning", "report"))
    assert not keys(tuning) & keys(report)
    assert len(tuning) + len(report) == len(half(records(texts), "all")) == 800
    assert 300 < len(tuning) < 500
    for seed in (0, 1):
        held_out = hold_out(records(texts), 0.5, None, seed).held_out
        assert keys(half(held_out, "tuning")) <= keys(tuning)


def test_held_out_rows_from_elsewhere_leave_the_training_side() -> None:
    assert keys(without(records(["a", "b"]), records(["b", "c"]))) == {"a"}


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.integers(0, 1000))
def test_shares_sum_up_and_are_off_by_less_than_one(weights: list[float], total: int) -> None:
    counts = shares(weights, total)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1


def test_a_mixture_ends_where_the_first_source_runs_short() -> None:
    assert largest_total([0.3], [7]) == 7
    assert largest_total([2.0, 1.0], [100, 10]) == 30
    assert largest_total([1.0, 1.0], [0, 10]) == 0


@pytest.fixture
def mixture(write: Files) -> tuple[Source, ...]:
    """Three parts of one file to one part of another."""
    many = write("many.jsonl", [{"text": f"many {i}"} for i in range(90)])
    few = write("few.jsonl", [{"body": f"few {i}"} for i in range(40)])
    return Source(str(many), 3.0), Source(str(few), 1.0, columns={"text": "body"})


def count_sources(prepare: Prepare, base: Tok, **options: object) -> Counter[str]:
    """How many training examples came from which file."""
    data = prepare(None, base, **options)
    return Counter(example["id"].split(":")[0] for example in data.train)


def test_weights_are_relative_numbers_of_examples(
    prepare: Prepare, base: Tok, mixture: tuple[Source, ...]
) -> None:
    counts = count_sources(prepare, base, mixture=mixture)
    assert counts == {"many.jsonl": 90, "few.jsonl": 30}
    counts = count_sources(prepare, base, mixture=mixture, train_samples=40)
    assert counts == {"many.jsonl": 30, "few.jsonl": 10}


def test_a_mixture_holds_out_its_weights_too(
    prepare: Prepare, base: Tok, mixture: tuple[Source, ...]
) -> None:
    data = prepare(None, base, mixture=mixture, eval_samples=8)
    assert data.eval is not None
    counts = Counter(example["id"].split(":")[0] for example in data.eval)
    assert counts == {"many.jsonl": 6, "few.jsonl": 2}


def test_asking_for_more_than_a_mixture_has_names_the_largest_number(
    prepare: Prepare, base: Tok, mixture: tuple[Source, ...]
) -> None:
    with pytest.raises(DataError, match=r"train_samples=200, .* 90 \+ 40 .* allow 120"):
        prepare(None, base, mixture=mixture, train_samples=200)
    with pytest.raises(ConfigError, match="not both"):
        prepare("movie_reviews", base, mixture=mixture)


def test_fewer_training_samples_are_a_part_of_more(
    prepare: Prepare, base: Tok, write: Files
) -> None:
    path = write("a.jsonl", [{"text": t} for t in TEXTS])
    sides = []
    for count in (10, 50):
        data = prepare(path, base, train_samples=count, eval_samples=20)
        assert data.eval is not None
        sides.append([{e["id"] for e in side} for side in (data.train, data.eval)])
    assert sides[0][0] < sides[1][0]
    assert sides[0][1] == sides[1][1]


def test_numbers_that_the_rows_do_not_allow_are_errors(
    prepare: Prepare, base: Tok, write: Files
) -> None:
    path = write("a.jsonl", [{"text": "one"}, {"text": "two"}])
    with pytest.raises(DataError, match=r"train_samples=3, but there are 2 examples.*allow 2"):
        prepare(path, base, train_samples=3)
    with pytest.raises(DataError, match=r"eval_samples: 3 asked for .* which has 2"):
        prepare(path, base, eval_samples=3)
    with pytest.raises(DataError, match="No training examples"):
        prepare(path, base, eval_samples=2)
