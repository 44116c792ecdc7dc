"""Worked numbers of the statistics."""

from __future__ import annotations

import math

import pytest

from peftcli.tables.statistics import aggregate, deviation, interval, paired, sign_flip


def test_interquartile_mean_of_worked_examples() -> None:
    assert aggregate([1, 2, 3, 4, 5, 6, 7, 100], "iqm") == pytest.approx(4.5)
    assert aggregate([1, 2, 3, 4, 100], "iqm") == pytest.approx(3.0)  # (.75*2 + 3 + .75*4) / 2.5
    assert aggregate([100, 3, 1, 4, 2], "iqm") == pytest.approx(3.0)
    assert aggregate([7.0], "iqm") == 7.0


def test_the_mean_of_tuning_seeds() -> None:
    assert aggregate([0.8, 0.9, 1.0], "mean") == pytest.approx(0.9)


def test_deviation_is_the_samples_and_one_seed_has_none() -> None:
    assert deviation([1.0, 2.0, 3.0]) == pytest.approx(1.0)
    assert deviation([1.0]) is None
    assert interval([1.0]) is None


def test_interval_holds_the_mean_and_repeats() -> None:
    low, high = interval([0.7, 0.8, 0.9]) or (math.nan, math.nan)
    assert 0.7 - 1e-9 < low < 0.8 < high < 0.9 + 1e-9
    assert interval([0.7, 0.8, 0.9]) == (low, high)
    assert interval([0.5, 0.5]) == (0.5, 0.5)


def test_sign_flip_counts_every_choice_of_signs() -> None:
    # |sums| of 1, 2, 3: 6 4 2 0 0 2 4 6; two of eight reach 6
    assert sign_flip([1.0, 2.0, 3.0]) == pytest.approx(2 / 8)
    # 1 - 2 + 3 = 2; six of eight reach 2
    assert sign_flip([1.0, -2.0, 3.0]) == pytest.approx(6 / 8)
    assert sign_flip([0.0, 0.0]) == 1.0
    assert sign_flip([0.1, 0.2, -0.3]) == 1.0  # a sum of 3e-17 is zero
    assert sign_flip([1.0] * 10) == pytest.approx(2 / 2**10)


def test_sign_flip_of_many_pairs_is_near_the_exact_value() -> None:
    values = [1.0] * 12 + [-1.0] * 9  # P(|Binomial(21) - 10.5| >= 1.5) = 0.6636
    exact = 1 - sum(math.comb(21, k) for k in (10, 11)) / 2**21
    assert sign_flip(values) == pytest.approx(exact, abs=0.01)


def test_paired_takes_differences_of_equal_seeds() -> None:
    found = paired([0.9, 0.8, 0.7], [0.8, 0.75, 0.6])
    assert found.difference == pytest.approx(0.25 / 3)
    assert found.p == pytest.approx(0.25)
    assert found.pairs == 3
