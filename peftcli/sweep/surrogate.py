"""Points to try by a surrogate of the finished runs, searched by MetaDE (`sweep.search=metade`).

    next point = argmin over what was not tried of  m(x) - KAPPA s(x)

m and s are mean and deviation of a Gaussian process fitted to all finished runs, anew for every
proposal. This is Bayesian optimisation with `metade` as the optimiser of its acquisition; it is not
the setting of the MetaDE paper, whose functions are evaluated 10^6 times and more, and of which no
number carries over.

Why the lower confidence bound (N. Srinivas et al., "Gaussian Process Optimization in the Bandit
Setting", ICML 2010): far from the best, expected improvement is zero to the last bit, and a greedy
comparison of zeros stands still. Runs that have not ended count with the mean that is foretold for
them (D. Ginsbourger, R. Le Riche, L. Carraro, "Kriging is Well-suited to Parallelize Optimization",
2010), so that several workers try different points.

Losses are taken by rank, as quantiles of a Gaussian (D. Salinas, H. Shen, V. Perrone, "A
Quantile-based Approach for Hyperparameter Transfer Learning", ICML 2020): a run that diverged is
the worst and not a million times as bad.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from peftcli.imports import optional
from peftcli.sweep import chance, evolution, metade
from peftcli.sweep.encoding import encoded
from peftcli.sweep.evolution import Array
from peftcli.sweep.objective import Scores
from peftcli.sweep.space import Point, Space

# 16,800 evaluations of the surrogate; with its fit 0.5 s of one core at 100 runs, 1.4 s at 200
BUDGET = metade.Budget(thetas=10, generations=4, individuals=20, steps=10)
KAPPA = 2.0  # deviations below the mean
LENGTHS = (0.05, 20.0)  # of the kernel, in unit cubes: shorter ones only tell runs apart
NOISE = (1e-6, 1.0)  # variance between runs of equal settings; that of all runs is 1
FIT_STEPS = 30  # of L-BFGS


def next_point(space: Space, tried: Mapping[Point, Scores | None], seed: int) -> Point | None:
    """What to try next: first a Latin hypercube, then what the surrogate asks for; None where it
    has too few results, or finds nothing new.
    """
    first = evolution.start(space, seed)
    if new := [point for point in first if point not in tried]:
        return new[0]
    known = sorted(point for point, scores in tried.items() if scores)
    if len(known) < 2:
        return None
    running = sorted(point for point, scores in tried.items() if scores is None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lengths at their bounds: a key that does not matter
        model = _fitted(_rows(space, known), _by_rank([-s[0] for p in known if (s := tried[p])]))
        if running:
            model = _with_foretold(model, _rows(space, running))
    rng = chance.stream(seed, "surrogate", len(tried))
    return _best_new(space, tried, model, rng)


def _best_new(
    space: Space, tried: Mapping[Point, Scores | None], model: Any, rng: np.random.Generator
) -> Point | None:
    """The best of all that MetaDE looked at and that was not tried."""
    seen: list[tuple[Array, Array]] = []

    def bound(U: Array) -> Array:
        rows = encoded(space, U)
        values = lower_bound(model, rows.reshape(-1, rows.shape[-1])).reshape(U.shape[:-1])
        seen.append((U.reshape(-1, U.shape[-1]), values.ravel()))
        return values

    metade.minimise(bound, len(space.dimensions), BUDGET, rng)
    U, values = (np.concatenate(part) for part in zip(*seen, strict=True))
    ranked = (space.at(u) for u in U[values.argsort(kind="stable")].tolist())
    return next((point for point in ranked if point not in tried), None)


def lower_bound(model: Any, rows: Array) -> Array:
    """m - KAPPA s of what the model says of rows (M, C), without the noise of a run."""
    mean, deviation = model.predict(rows, return_std=True)
    noise = model.kernel_.k2.noise_level
    return mean - KAPPA * np.sqrt((deviation**2 - noise).clip(0.0))


def _rows(space: Space, points: list[Point]) -> Array:
    return encoded(space, np.array([space.position(point) for point in points]))


def _by_rank(losses: list[float]) -> Array:
    """Quantiles of a Gaussian; equal losses get equal ones."""
    from scipy.special import ndtri
    from scipy.stats import rankdata

    return ndtri((rankdata(losses) - 0.5) / len(losses))


def _fitted(rows: Array, y: Array) -> Any:
    """A Gaussian process by maximum likelihood: Matern 5/2, a length for every column, noise."""
    of = optional("sklearn.gaussian_process.kernels")
    shape = of.Matern([0.5] * rows.shape[1], LENGTHS, nu=2.5)
    kernel = of.ConstantKernel(1.0, (0.1, 10.0)) * shape + of.WhiteKernel(0.01, NOISE)
    return _process(kernel, _climb).fit(rows, y)


def _climb(objective: Any, start: Array, bounds: Array) -> tuple[Array, float]:
    """A few steps towards the best kernel: the last digits of its lengths change no proposal."""
    from scipy.optimize import minimize

    options = {"maxiter": FIT_STEPS}
    found = minimize(objective, start, method="L-BFGS-B", jac=True, bounds=bounds, options=options)
    return found.x, found.fun


def _with_foretold(model: Any, rows: Array) -> Any:
    """The model as if what still runs had come to what it says."""
    X = np.concatenate([model.X_train_, rows])
    y = np.concatenate([model.y_train_, model.predict(rows)])
    return _process(model.kernel_, None).fit(X, y)


def _process(kernel: Any, optimizer: Any) -> Any:
    return optional("sklearn.gaussian_process").GaussianProcessRegressor(
        kernel, optimizer=optimizer
    )
