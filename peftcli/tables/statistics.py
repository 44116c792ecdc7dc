"""Few seeds, honestly: means, interquartile means, bootstrap intervals, paired sign-flip tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Aggregate = Literal["mean", "iqm"]
RESAMPLES = 10_000
EXACT = 20  # pairs at most whose 2^n sign patterns are all counted


def iqm(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of the middle half of each row of `values` (..., N).

    The sorted value i covers (i, i + 1) on an axis of length N and weighs as much as lies between
    N/4 and 3N/4, so those at the borders count in part (Agarwal et al., Deep Reinforcement Learning
    at the Edge of the Statistical Precipice, 2021, arXiv 2108.13264, with whole values there).
    """
    count = values.shape[-1]
    edges = np.arange(count + 1).clip(count / 4, 3 * count / 4)
    return np.sort(values, axis=-1) @ np.diff(edges) / (count / 2)


def aggregate(values: Sequence[float], how: Aggregate) -> float:
    """One number for the seeds of a cell."""
    return float(_aggregated(np.asarray(values, float), how))


def _aggregated(values: NDArray[np.float64], how: Aggregate) -> NDArray[np.float64]:
    return iqm(values) if how == "iqm" else values.mean(axis=-1)


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation; None of fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def interval(values: Sequence[float], how: Aggregate = "mean") -> tuple[float, float] | None:
    """The 95 % percentile bootstrap interval, of 10,000 resamples drawn by a fixed seed; None of
    fewer than two values.
    """
    if len(values) < 2:
        return None
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(_aggregated(np.asarray(values, float)[drawn], how), (0.025, 0.975))
    return float(low), float(high)


@dataclass(frozen=True)
class Paired:
    """How far one is above another on the same seeds."""

    difference: float  # mean
    interval: tuple[float, float] | None  # 95 %, bootstrap over pairs
    p: float  # two-sided, of the sign-flip test
    pairs: int


def paired(mine: Sequence[float], theirs: Sequence[float]) -> Paired:
    """The paired comparison of values on equal seeds, in equal order."""
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    mean = math.fsum(differences) / len(differences)
    return Paired(mean, interval(differences), sign_flip(differences), len(differences))


def sign_flip(differences: Sequence[float]) -> float:
    """The two-sided p-value of the paired permutation test: the part of all 2^n choices of signs
    whose sum is at least as far from zero as the one seen (Fisher 1935).

    Exact up to 20 pairs; of more, 100,000 choices drawn by a fixed seed, the one seen among them.
    """
    values = np.asarray(differences, float)
    if len(values) <= EXACT:
        sums = np.zeros(1)
        for value in values:
            sums = np.concatenate((sums + value, sums - value))
    else:
        drawn = np.random.default_rng(0).choice((1.0, -1.0), size=(99_999, len(values)))
        sums = np.concatenate((values.sum(keepdims=True), drawn @ values))
    far = np.abs(sums)
    tolerance = 1e-9 * np.abs(values).sum()  # sums that are equal but for rounding
    return float(np.mean(far >= far[0] - tolerance))
