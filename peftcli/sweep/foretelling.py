"""Regressions that foretell a run's end from its beginning, and how far they are off.

    x = [y(1..tau), first differences, second differences, what else is known of the run]
    y(T) ~ Normal(f(x), sigma^2)        sigma: the root mean square of held-out errors

B. Baker, O. Gupta, R. Raskar, N. Naik, "Accelerating Neural Architecture Search using Performance
Prediction", ICLR workshop 2018, arXiv 1705.10823. Of its regressors `ols` is least squares by the
pseudo-inverse, since the differences are linear in the values, with leave-one-out errors in closed
form; `svr` a nu-SVR with an RBF kernel, its parameters by random search with three-fold
cross-validation, with errors of ten folds. Ranges and number of draws are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from peftcli.imports import optional

if TYPE_CHECKING:
    from numpy import ndarray

DRAWS = 30  # of a nu-SVR's parameters: 0.3 s with 20 runs, 1.2 s with 150
NU, LOG_C, LOG_GAMMA = (0.01, 1.0), (-3.0, 2.0), (-4.0, 1.0)  # where they are drawn
CHOOSING_FOLDS, ERROR_FOLDS = 3, 10
Row = tuple[float, ...]


class Runs(NamedTuple):
    """Finished runs: their features, and their ends."""

    rows: tuple[Row, ...]
    final: Row


class Regression(NamedTuple):
    """A fitted f and its sigma."""

    f: Callable[[Row], float]
    deviation: float


def features(values: Sequence[float], traits: Sequence[float] = ()) -> Row:
    """3 tau - 3 numbers of tau >= 2 values, their first and their second differences, and further
    traits of the run.
    """
    first = [b - a for a, b in pairwise(values)]
    second = [b - a for a, b in pairwise(first)]
    return (*values, *first, *second, *traits)


@lru_cache(maxsize=32)  # several running members are judged by the same finished ones
def fitted(model: str, runs: Runs, tuned_on: Runs | None = None) -> Regression | None:
    """`model` (ols, svr) of the ends of `runs`; None where they are too few to tell errors.
    Deterministic. `tuned_on`: what a nu-SVR's parameters are chosen on; default: `runs`.
    """
    import numpy as np

    middle, width = _scale(runs.rows)
    Z, y = (np.asarray(runs.rows) - middle) / width, np.asarray(runs.final)
    found = _least_squares(Z, y) if model == "ols" else _nu_svr(Z, y, _chosen(tuned_on or runs))
    if found is None:
        return None
    f, errors = found
    deviation = float(np.sqrt(np.mean(errors**2)))
    return Regression(lambda row: f((np.asarray(row) - middle) / width), deviation)


def _scale(values: Sequence[float] | Sequence[Row] | ndarray) -> tuple[ndarray, ndarray]:
    """Mean and deviation of each column; 1 for that of one which is the same in all runs, and so
    tells nothing.
    """
    import numpy as np

    width = np.std(values, 0)
    return np.mean(values, 0), np.where(width > 0, width, 1.0)


def _least_squares(Z: ndarray, y: ndarray) -> tuple[Callable[[ndarray], float], ndarray] | None:
    """The function and its leave-one-out errors e / (1 - h)."""
    import numpy as np

    X = np.hstack([np.ones((len(Z), 1)), Z])
    inverse = np.linalg.pinv(X, rcond=1e-10)
    leverage = np.einsum("ij,ji->i", X, inverse)
    if leverage.max() > 1 - 1e-6:
        return None
    w = inverse @ y
    return lambda z: float(w[0] + z @ w[1:]), (y - X @ w) / (1 - leverage)


@lru_cache(maxsize=32)
def _chosen(runs: Runs) -> tuple[float, float, float]:
    """nu, C and gamma of the least error in held-out folds."""
    import numpy as np

    middle, width = _scale(runs.rows)
    level, spread = _scale(runs.final)
    Z, y = (np.asarray(runs.rows) - middle) / width, (np.asarray(runs.final) - level) / spread
    rng = np.random.default_rng(0)
    nu, log_C, log_gamma = (rng.uniform(*ends, DRAWS) for ends in (NU, LOG_C, LOG_GAMMA))
    drawn = list(zip(nu, 10**log_C, 10**log_gamma, strict=True))
    return min(drawn, key=lambda p: float((_held_out_errors(Z, y, p, CHOOSING_FOLDS) ** 2).sum()))


def _nu_svr(
    Z: ndarray, y: ndarray, parameters: tuple[float, float, float]
) -> tuple[Callable[[ndarray], float], ndarray]:
    """The function and its errors in held-out folds."""
    level, spread = _scale(y)
    target = (y - level) / spread
    svr = _regressor(parameters).fit(Z, target)
    errors = _held_out_errors(Z, target, parameters, ERROR_FOLDS)
    return lambda z: float(level + spread * svr.predict(z[None])[0]), spread * errors


def _held_out_errors(
    Z: ndarray, y: ndarray, parameters: tuple[float, float, float], num_folds: int
) -> ndarray:
    of = optional("sklearn.model_selection")
    folds = of.KFold(num_folds, shuffle=True, random_state=0)
    return of.cross_val_predict(_regressor(parameters), Z, y, cv=folds) - y


def _regressor(parameters: tuple[float, float, float]) -> Any:
    nu, C, gamma = parameters
    return optional("sklearn.svm").NuSVR(nu=nu, C=C, gamma=gamma)
