"""What a sweep searches over: the swept words of a command line as typed dimensions.

    method=lora,dora   method.r=4,8,16   'method.r=range(4,17,4)'    choices, numbers in order
    'optimizer.lr=interval(1e-5,1e-2)'   'optimizer.lr=tag(log,interval(1e-5,1e-2))'
    'method.r=int(interval(2,64))'                                   whole numbers

A value becomes the text behind `=` once and is never parsed into anything finer than that text, so
that a point means the same in a ledger, on a command line and to a search.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peftcli.errors import ConfigError

Point = tuple[str, ...]  # `key=value` of every dimension, in their order
DIGITS = 4  # significant ones of a value drawn from an interval: it is read by people


@dataclass(frozen=True)
class Choices:
    """One of several values; numbers are searched in their order."""

    key: str
    values: tuple[str, ...]

    @property
    def is_ordered(self) -> bool:
        """Whether all values are numbers, sorted."""
        numbers = [_number(value) for value in self.values]
        known = [number for number in numbers if number is not None]
        return len(known) == len(numbers) > 1 and known == sorted(known)

    @property
    def size(self) -> int:
        """How many values there are."""
        return len(self.values)

    def at(self, u: float) -> str:
        """The value at `u` in [0, 1)."""
        return self.values[min(int(u * self.size), self.size - 1)]

    def position(self, text: str) -> float:
        """Where in [0, 1) a value stands, the inverse of `at`."""
        return (self.values.index(text) + 0.5) / self.size

    def holds(self, text: str) -> bool:
        """Whether it is one of the values."""
        return text in self.values

    def describe(self) -> dict[str, Any]:
        """Type and range, as a reader of the record wants them."""
        return {"key": self.key, "type": "choice", "values": list(self.values)}

    def scaled(self, factor: float) -> Choices:
        """All numbers times a factor; what is none is refused where a run is made of it."""
        numbers = {value: _number(value) for value in self.values}
        texts = (v if n is None else _text(n * factor) for v, n in numbers.items())
        return replace(self, values=tuple(texts))


@dataclass(frozen=True)
class Interval:
    """A number between two ends, both included; `log`: evenly on a logarithmic scale."""

    key: str
    low: float
    high: float
    log: bool = False
    integer: bool = False

    @property
    def size(self) -> int | None:
        """How many values there are; None: no end of them."""
        return int(self.high - self.low) + 1 if self.integer else None

    def at(self, u: float) -> str:
        """The value at `u` in [0, 1)."""
        low, high = self.ends
        value = _back(low + u * (high - low), self.log)
        return self.text(round(value) if self.integer else value)

    def position(self, text: str) -> float:
        """Where in [0, 1) a value stands, the inverse of `at`."""
        low, high = self.ends
        return (_scale(float(text), self.log) - low) / (high - low)

    def text(self, value: float) -> str:
        """A value as it is written: few digits, inside the ends."""
        if self.integer:
            return str(int(min(max(value, self.low), self.high)))
        written = _text(value)
        return written if self.low <= float(written) <= self.high else repr(self._nearest(value))

    def holds(self, text: str) -> bool:
        """Whether it lies between the ends."""
        value = _number(text)
        return value is not None and self.low <= value <= self.high

    def describe(self) -> dict[str, Any]:
        """Type and range, as a reader of the record wants them."""
        kind = "integer" if self.integer else "float"
        ends = {"low": self.low, "high": self.high}
        return {"key": self.key, "type": kind, **ends, "log": self.log}

    def scaled(self, factor: float) -> Interval:
        """Both ends times a factor."""
        return replace(self, low=self.low * factor, high=self.high * factor, integer=False)

    def _nearest(self, value: float) -> float:
        return min(max(value, self.low), self.high)

    @property
    def ends(self) -> tuple[float, float]:
        """Where its positions begin and end, on its own scale."""
        margin = 0.5 if self.integer else 0.0  # each whole number has an equal share
        return _scale(self.low - margin, self.log), _scale(self.high + margin, self.log)


Dimension = Choices | Interval


@dataclass(frozen=True)
class Space:
    """The product of its dimensions."""

    dimensions: tuple[Dimension, ...]

    @property
    def keys(self) -> list[str]:
        """What is swept, in the order given."""
        return [d.key for d in self.dimensions]

    @property
    def size(self) -> int | None:
        """How many points there are; None: no end of them."""
        sizes = [d.size for d in self.dimensions]
        return None if None in sizes else math.prod(size or 0 for size in sizes)

    def points(self) -> Iterator[Point]:
        """Every point, the last key turning fastest.

        Raises:
            ConfigError: an interval has no end of values.
        """
        for d in self.dimensions:
            if not isinstance(d, Choices):
                raise ConfigError(
                    f"{d.key}=interval({_text(d.low)},{_text(d.high)}): a grid needs values. List "
                    f"them ({d.key}=A,B,C), or search: sweep.search=random or optuna."
                )
        choices = [d for d in self.dimensions if isinstance(d, Choices)]
        for values in itertools.product(*(d.values for d in choices)):
            yield tuple(f"{d.key}={value}" for d, value in zip(choices, values, strict=True))

    def at(self, us: Sequence[float]) -> Point:
        """The point at a position in the unit cube."""
        return tuple(f"{d.key}={d.at(u)}" for d, u in zip(self.dimensions, us, strict=True))

    def position(self, point: Point) -> list[float]:
        """Where in the unit cube a point stands."""
        texts = values_of(point)
        return [d.position(texts[d.key]) for d in self.dimensions]

    def point_in(self, given: Mapping[str, str]) -> Point | None:
        """The point among the values of a run; None where the run is of another space."""
        if all(d.key in given and d.holds(given[d.key]) for d in self.dimensions):
            return tuple(f"{d.key}={given[d.key]}" for d in self.dimensions)
        return None

    def only(self, keys: Sequence[str]) -> Space:
        """The dimensions of `keys`, with or without a `+`."""
        return Space(tuple(d for d in self.dimensions if d.key.lstrip("+") in keys))

    def apart(self, keys: Sequence[str]) -> list[tuple[Point, Space]]:
        """The space of the other dimensions for every combination of the values of `keys`."""
        fixed = self.only(keys)
        rest = Space(tuple(d for d in self.dimensions if d not in fixed.dimensions))
        return [(point, rest) for point in fixed.points()]

    def scaled(self, key: str, factor: float) -> Space:
        """The numbers of one key times a factor."""
        if factor == 1.0:
            return self  # the texts stay as they were given
        return Space(tuple(d.scaled(factor) if d.key == key else d for d in self.dimensions))

    def describe(self) -> list[dict[str, Any]]:
        """Every dimension with its type and range."""
        return [d.describe() for d in self.dimensions]

    def digest(self) -> str:
        """Hash of what is searched."""
        return hashlib.sha256(json.dumps(self.describe()).encode()).hexdigest()


def parse(words: Sequence[str]) -> Space:
    """The swept ones among overrides in Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create().parse_overrides(list(words))
    return Space(tuple(dimension(o) for o in overrides if o.is_sweep_override()))


def values_of(overrides: Sequence[str]) -> dict[str, str]:
    """Key to text; what is given twice counts as it stands last."""
    return {key: text for key, _, text in (o.partition("=") for o in overrides)}


def dimension(override: Any) -> Dimension:
    """What an override of Hydra's sweeps over.

    Raises:
        ConfigError: nothing, or an interval that is none.
    """
    key, sweep = override.get_key_element(), override.value()
    if override.is_interval_sweep():
        return _interval(key, sweep.start, sweep.end, sweep.tags)
    if not hasattr(sweep, "include"):
        sweep = replace(sweep, shuffle=False)  # a search has an order of its own
    values = tuple(dict.fromkeys(replace(override, _value=sweep).sweep_string_iterator()))
    if not values:
        raise ConfigError(f"{override.input_line}: sweeps over nothing.")
    return Choices(key, values)


def _interval(key: str, low: float, high: float, tags: set[str]) -> Interval:
    log, given = "log" in tags, f"{key}=interval({low},{high})"
    if not low < high:
        raise ConfigError(f"{given}: the first end must be below the second.")
    if log and low <= 0:
        raise ConfigError(f"{given}: a logarithmic interval begins above 0.")
    if unknown := tags - {"log"}:
        raise ConfigError(f"{given}: the tag {', '.join(sorted(unknown))} means nothing; log does.")
    return Interval(key, low, high, log, isinstance(low, int) and isinstance(high, int))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _text(value: float) -> str:
    return f"{value:.{DIGITS}g}"


def _scale(value: float, log: bool) -> float:
    return math.log(value) if log else value


def _back(value: float, log: bool) -> float:
    return math.exp(value) if log else value
