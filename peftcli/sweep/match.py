"""Methods at equal numbers of trainable parameters: `sweep.match_parameters`.

Each method declares the option that is its size (`Method.size_option`). Its value is found by
counting what would train on the model without weights, so that no weights are loaded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from omegaconf import DictConfig

from peftcli import config
from peftcli.build import empty_host
from peftcli.core.host import Host
from peftcli.errors import ConfigError
from peftcli.screen import say
from peftcli.settings import Run

LARGEST = 2**31
_WANTED = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMbB%]?)")
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}


@dataclass(frozen=True)
class Match:
    """The override that comes nearest to a number of parameters, and the number it reaches."""

    override: str  # method.r=13
    parameters: int
    target: int


def match(run: Run, wanted: str) -> Match:
    """The value of the method's size option at which most nearly `wanted` parameters train:
    "300k", "1.5M", or "0.3%" of the model's. Heads are not counted.

    Raises `ConfigError` where the method has no such option, or where the nearest that it reaches
    is more than twice or less than half of that.
    """
    name, option = type(run.method).__name__, run.method.size_option
    if option is None:
        raise ConfigError(
            f"sweep.match_parameters={wanted}: {name} has no option by which more or fewer "
            "parameters train. Leave it out of this sweep, or leave match_parameters out."
        )
    scale = Scale(run, option)
    target = target_of(wanted, scale.base)
    value = scale.nearest(target)
    reached = scale.counts[value]
    if not target / 2 <= reached <= 2 * target:
        raise ConfigError(
            f"sweep.match_parameters={wanted}: {name} cannot train about {target:,} parameters; "
            f"nearest is method.{option}={value} with {reached:,}."
        )
    return Match(f"method.{option}={value}", reached, target)


def sizes_for(wanted: str) -> Callable[[DictConfig], str]:
    """What makes a member's method train about `wanted` parameters, as an override; each method on
    each model is solved once, and said.
    """
    known: dict[str, str] = {}

    def size(cfg: DictConfig) -> str:
        key = f"{cfg.model} {cfg.method}"
        if key not in known:
            found = match(config.typed(cfg), wanted)
            known[key] = found.override
            name = str(cfg.method._target_).split(".")[-2]
            say(f"{name}: {found.override} trains {found.parameters:,} of {found.target:,} wanted")
        return known[key]

    return size


def target_of(wanted: str, base: int) -> int:
    """A number of parameters from "300k" or "0.3%" of `base`."""
    found = _WANTED.fullmatch(wanted.strip())
    value = float(found[1]) if found else 0.0
    if found is None or value <= 0:
        raise ConfigError(f"sweep.match_parameters={wanted}: takes 300k, 1.5M or 0.3%.")
    return round(value / 100 * base if found[2] == "%" else value * _UNITS[found[2].lower()])


@dataclass
class Scale:
    """How many parameters train at each value of a method's size option, counted once each."""

    run: Run
    option: str
    counts: dict[int, int] = field(default_factory=dict)  # value: parameters that train
    refused: dict[int, ConfigError] = field(default_factory=dict)
    spare: Host | None = None  # a model that a refused value left as it was

    @property
    def base(self) -> int:
        """Parameters of the model itself."""
        self.spare = self.spare or empty_host(self.run)[0]
        return self.spare.num_parameters()[1]

    def count(self, value: int) -> int | None:
        """What trains at the value; None where the method refuses it."""
        if value in self.counts:
            return self.counts[value]
        if value in self.refused:
            return None
        host = self.spare or empty_host(self.run)[0]
        self.spare = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # the method would take another value
                host.add(replace(self.run.method, **{self.option: value}))
        except UserWarning as e:
            self.refused[value] = ConfigError(str(e))
            return None
        except ConfigError as e:
            self.spare, self.refused[value] = host, e
            return None
        self.counts[value] = host.num_parameters()[0]
        return self.counts[value]

    def nearest(self, target: int) -> int:
        """The value that comes nearest to the target; counts grow, or fall, with the value."""
        low, high = self._bracket(target)
        rising = self.counts[min(self.counts)] <= self.counts[max(self.counts)]
        while (middle := self._between(low, high, target)) is not None:
            if (self.counts[middle] < target) == rising:
                low = middle
            else:
                high = middle
        return min(self.counts, key=lambda value: (abs(self.counts[value] - target), value))

    def _bracket(self, target: int) -> tuple[int, int]:
        """Two values around the target: powers of two, as far as the method takes them and they
        make a difference.
        """
        value, taken = 1, []
        while value <= LARGEST and not (taken and value in self.refused):
            if self.count(value) is not None:
                taken.append(value)
                if len(taken) > 1 and self._passed(taken, target):
                    break
            elif not taken and value >= 64:
                break
            value *= 2
        if not taken:
            raise next(iter(self.refused.values()))
        return (taken[-2] if len(taken) > 1 else taken[0]), value

    def _passed(self, taken: list[int], target: int) -> bool:
        """Whether the last value lies beyond the target, or larger ones change nothing."""
        first, before, last = (self.counts[v] for v in (taken[0], taken[-2], taken[-1]))
        if last == before:
            return True
        return last >= target if last > first else last <= target

    def _between(self, low: int, high: int, target: int) -> int | None:
        """A value between two that the method takes, where a straight line meets the target or near
        it; None where there is none.
        """
        if high - low < 2:
            return None
        middle = (low + high) // 2
        below, above = self.counts.get(low), self.counts.get(high)
        if below is not None and above is not None and below != above:
            middle = low + round((target - below) / (above - below) * (high - low))
        middle = min(max(middle, low + 1), high - 1)
        return next((v for v in _outwards(middle, low, high) if self.count(v) is not None), None)


def _outwards(middle: int, low: int, high: int) -> Iterator[int]:
    """The values between two others, nearest to the middle first."""
    yield middle
    for step in range(1, high - low):
        yield from (v for v in (middle - step, middle + step) if low < v < high)
