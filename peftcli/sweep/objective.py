"""What a sweep makes best: which metrics of a run count, and in which direction."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from peftcli.errors import ConfigError, did_you_mean
from peftcli.settings import Sweep
from peftcli.train.better import HIGHER_IS_BETTER, LOWER_IS_BETTER

COSTS = {"num_trainable_params", "file_size", "peak_memory", "train_time"}
BY_ITSELF = ("accuracy", "pearson", "loss")  # what `auto` takes, the first that runs have
Scores = tuple[float, ...]  # one for each metric; larger is better


@dataclass(frozen=True)
class Objective:
    """Metrics by name, each with the sign that makes larger better."""

    names: tuple[str, ...]
    signs: tuple[int, ...]

    def scores(self, metrics: Mapping[str, float]) -> Scores | None:
        """The metrics of one run; None where one is not there or not finite: a failure."""
        values = [metrics.get(name, math.nan) for name in self.names]
        if not all(map(math.isfinite, values)):
            return None
        return tuple(sign * value for sign, value in zip(self.signs, values, strict=True))

    def shown(self, scores: Scores) -> dict[str, float]:
        """Scores as the metrics that they came from."""
        signed = zip(self.names, self.signs, scores, strict=True)
        return {name: sign * score for name, sign, score in signed}


def objective(sweep: Sweep, measured: Collection[str]) -> Objective:
    """The objective of a sweep whose runs have `measured` these metrics so far.

    Raises:
        ConfigError: no run has the metric, or nobody knows whether more of it is better.
    """
    names = (sweep.metric,) if isinstance(sweep.metric, str) else sweep.metric
    if names == ("auto",):
        names = (next((name for name in BY_ITSELF if name in measured), "loss"),)
    for name in names:
        if measured and name not in measured:
            raise ConfigError(
                f"sweep.metric={name}: the runs have no such metric."
                f"{did_you_mean(name, measured)} They have {', '.join(sorted(measured))}."
            )
    return Objective(names, tuple(_sign(name, sweep) for name in names))


def _sign(name: str, sweep: Sweep) -> int:
    if sweep.direction != "auto" and isinstance(sweep.metric, str):
        return 1 if sweep.direction == "maximize" else -1
    if name in HIGHER_IS_BETTER:
        return 1
    if name in LOWER_IS_BETTER | COSTS:
        return -1
    known = HIGHER_IS_BETTER | LOWER_IS_BETTER | COSTS
    raise ConfigError(
        f"sweep.metric={name}: is more of it better? Say sweep.direction=maximize or minimize."
        f"{did_you_mean(name, known)}"
    )


def mean(scores: Collection[Scores]) -> Scores:
    """The mean of each metric over runs."""
    return tuple(sum(values) / len(scores) for values in zip(*scores, strict=True))


def dominates(a: Scores, b: Scores) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))
