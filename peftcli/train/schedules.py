"""Learning rates over optimizer steps, as parts of the rate that is set: the schedules of
`transformers.get_scheduler` under their names and with their options. That function's module
imports peft, bitsandbytes and a compiler wherever they are installed: 3 s of every start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from peftcli.errors import ConfigError

Shape = Literal["linear", "cosine", "1-sqrt"]


class Span(NamedTuple):
    """What a schedule stretches over: `total` steps, the first `warmup` of which rise to `lr`."""

    lr: float
    warmup: int
    total: int

    def done(self, step: int) -> float:
        """The part of the steps after the warm-up that is done."""
        return (step - self.warmup) / max(1, self.total - self.warmup)


@dataclass(frozen=True)
class Schedule:
    """A rise in a straight line, then `after`; its fields are what `scheduler.kwargs` may say."""

    def check(self, span: Span) -> None:
        """Raise `ConfigError` where the options do not go with the span."""

    def part(self, span: Span, step: int) -> float:
        """What the rate of this step is multiplied by."""
        if step < span.warmup:
            return self.rise(step / max(1, span.warmup))
        return self.after(span, step)

    def rise(self, done: float) -> float:
        """The factor when this part of the warm-up is done."""
        return done

    def after(self, span: Span, step: int) -> float:
        """The factor at a step after the warm-up."""
        return 1.0


@dataclass(frozen=True)
class Constant(Schedule):
    """1, without a warm-up."""

    def part(self, span: Span, step: int) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line to 0 at the last step."""

    def after(self, span: Span, step: int) -> float:
        """The part of the steps that is left."""
        return max(0.0, (span.total - step) / max(1, span.total - span.warmup))


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine to 0; `num_cycles` counts whole waves."""

    num_cycles: float = 0.5

    def after(self, span: Span, step: int) -> float:
        """(1 + cos) / 2."""
        return max(0.0, wave(self.num_cycles * 2.0 * span.done(step)))


@dataclass(frozen=True)
class CosineWithRestarts(Schedule):
    """`num_cycles` half cosines to 0, each from the top again."""

    num_cycles: float = 1

    def after(self, span: Span, step: int) -> float:
        """(1 + cos) / 2 of the cycle."""
        done = span.done(step)
        return 0.0 if done >= 1 else max(0.0, wave(self.num_cycles * done % 1.0))


@dataclass(frozen=True)
class Polynomial(Schedule):
    """lr_end + (lr - lr_end) (1 - done)^power."""

    lr_end: float = 1e-7
    power: float = 1.0

    def check(self, span: Span) -> None:
        """`lr_end` must lie below the rate."""
        if self.lr_end >= span.lr:
            raise ConfigError(
                f"scheduler.kwargs.lr_end={self.lr_end}: must be less than optimizer.lr={span.lr}."
            )

    def after(self, span: Span, step: int) -> float:
        """The same by lr."""
        left = max(0.0, 1 - span.done(step))
        return ((span.lr - self.lr_end) * left**self.power + self.lr_end) / span.lr


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """1 / sqrt of the steps since the warm-up, in units of `timescale`: by default the warm-up's
    steps, or 10,000.
    """

    timescale: int | None = None

    def after(self, span: Span, step: int) -> float:
        """1 at the end of the warm-up."""
        unit = self.timescale or span.warmup or 10_000
        return 1.0 / math.sqrt((step + (unit - span.warmup)) / unit)


@dataclass(frozen=True)
class CosineWithMinLR(Schedule):
    """A cosine to `min_lr`, or to the part `min_lr_rate` of lr."""

    num_cycles: float = 0.5
    min_lr: float | None = None
    min_lr_rate: float | None = None

    def __post_init__(self) -> None:
        if (self.min_lr is None) == (self.min_lr_rate is None):
            raise ConfigError(
                "scheduler=cosine_with_min_lr takes one of scheduler.kwargs.min_lr and "
                "scheduler.kwargs.min_lr_rate."
            )

    def after(self, span: Span, step: int) -> float:
        """(1 + cos) / 2 between the least and 1."""
        least = self.min_lr_rate if self.min_lr is None else self.min_lr / span.lr
        assert least is not None, "one of both"
        return max(0.0, wave(self.num_cycles * 2.0 * span.done(step)) * (1 - least) + least)


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """Up, level, down (Hu et al. 2024, arXiv 2404.06395); by default the level takes what the other
    two leave of all steps.
    """

    num_decay_steps: int
    num_stable_steps: int | None = None
    warmup_type: Shape = "linear"
    decay_type: Shape = "cosine"
    min_lr_ratio: float = 0.0
    num_cycles: float = 0.5

    def rise(self, done: float) -> float:
        """From `min_lr_ratio` to 1."""
        rises: dict[Shape, Callable[[float], float]] = {
            "linear": lambda u: u,
            "cosine": lambda u: 0.5 * (1.0 - math.cos(math.pi * u)),
            "1-sqrt": lambda u: 1.0 - math.sqrt(1.0 - u),
        }
        return self._above_least(rises[self.warmup_type](done))

    def after(self, span: Span, step: int) -> float:
        """1, and from 1 to `min_lr_ratio` in the last steps."""
        stable = self.num_stable_steps
        if stable is None:
            stable = span.total - span.warmup - self.num_decay_steps
        since = step - span.warmup - stable
        if since < 0:
            return 1.0
        if since >= self.num_decay_steps:
            return self.min_lr_ratio
        falls: dict[Shape, Callable[[float], float]] = {
            "linear": lambda u: 1.0 - u,
            "cosine": lambda u: wave(self.num_cycles * 2.0 * u),
            "1-sqrt": lambda u: 1.0 - math.sqrt(u),
        }
        return self._above_least(falls[self.decay_type](since / max(1, self.num_decay_steps)))

    def _above_least(self, part: float) -> float:
        return max(0.0, part * (1.0 - self.min_lr_ratio) + self.min_lr_ratio)


def wave(half_turns: float) -> float:
    """(1 + cos) / 2 of an angle in half turns: 1 at 0, 0 at 1."""
    return 0.5 * (1.0 + math.cos(math.pi * half_turns))


SCHEDULES: dict[str, type[Schedule]] = {
    "linear": Linear,
    "cosine": Cosine,
    "cosine_with_restarts": CosineWithRestarts,
    "polynomial": Polynomial,
    "constant": Constant,
    "constant_with_warmup": Schedule,
    "inverse_sqrt": InverseSqrt,
    "cosine_with_min_lr": CosineWithMinLR,
    "warmup_stable_decay": WarmupStableDecay,
}
