"""What Hydra makes of a sweep's line: the settings of the sweep, the members' own words by Hydra's
sweep grammar (choices, ranges, globs), and each member's checked configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from peftcli import cards, config, hydra_app
from peftcli.errors import ConfigError
from peftcli.hydra_words import our_words
from peftcli.settings import Sweep
from peftcli.sweep.ledger import id_of
from peftcli.sweep.space import Dimension, Space, dimension

Words = tuple[str, ...]  # overrides
# What only says how members are run: the same line without these is the same sweep.
HOW = tuple(
    f"sweep.{key}"
    for key in (
        "jobs", "timeout", "max_failures", "stale_after", "launcher", "workers", "launcher_options",
        "trials",
    )
)  # fmt: skip
ELSEWHERE = {
    "run_dir": "is the folder of one run. Members of a sweep lie in sweep_dir=FOLDER.",
    "resume": "members of a sweep go on by themselves; leave it out.",
    "hydra.sweep.subdir": "members are named by a hash of their configuration; leave it out.",
    "hydra/launcher": "launchers are chosen by sweep.launcher=joblib|ray|submitit.",
    "hydra/sweeper": "members are divided by peftcli itself; leave it out.",
}


@dataclass(frozen=True)
class Line:
    """A sweep's line, read."""

    given: Words  # as typed
    base: Words  # what all members share
    space: Space  # what is swept, in the order of the line
    name: str  # of the recipe or the run, which names the default folder
    sweep: Sweep
    folder: Path
    folder_is_given: bool

    @property
    def grid(self) -> list[Words]:
        """Every combination of the choices; the last key varies fastest."""
        return list(self.space.points())

    @property
    def identity(self) -> list[str]:
        """What makes another line the same sweep."""
        return sorted(w for w in self.given if _key(w) not in (*HOW, "sweep_dir"))


class Composer:
    """Composes configurations from words; one search path for all of them."""

    def __init__(self, config_dirs: Sequence[Path] = (), config_name: str | None = None) -> None:
        self.config_dirs = list(config_dirs)
        self.config_name = config_name or cards.ROOT
        self.of_files: dict[Words, DictConfig] = {}  # what choices of files make, without values
        with our_words([], self.config_dirs):
            self.hydra: Hydra = hydra_app.open_hydra(self.config_dirs)

    def read(self, overrides: Sequence[str]) -> Line:
        """The line that these words are. Raises `ConfigError` for what no sweep can mean."""
        given = [w for w in overrides if w != "hydra.mode=MULTIRUN"]
        with our_words(given, self.config_dirs):
            parser = OverridesParser.create(config_loader=self.hydra.config_loader)
            words = hydra_app.normalised(given, self.config_dirs)
            parsed = parser.parse_overrides(words)
            own = [o for o in parsed if _is_of_the_sweep(o) and not o.is_sweep_override()]
            cfg = self._composed([str(o.input_line) for o in own])
            recipe_s = [f"{k}={v}" for k, v in (cfg.hydra.sweeper.get("params") or {}).items()]
            parsed = [*parser.parse_overrides(recipe_s), *parsed]
            swept = _swept(parsed)
        for override in parsed:
            _refuse(override)
        fixed = [o for o in parsed if not o.is_sweep_override() and _place(o) not in swept]
        return Line(
            given=tuple(given),
            base=tuple(str(o.input_line) for o in fixed if _first(o) not in cards.OF_SWEEPS),
            space=Space(tuple(swept.values())),
            name=str(cfg.name),
            sweep=config.sweep_of(cfg, self.config_dirs),
            folder=Path(cfg.hydra.sweep.dir),
            folder_is_given=any(_key(w) in ("sweep_dir", "hydra.sweep.dir") for w in given),
        )

    def member(self, words: Sequence[str]) -> tuple[str, DictConfig]:
        """(id, configuration) of the run that these words make, every value checked."""
        with our_words(words, self.config_dirs):
            cfg = hydra_app.own_part(self._composed(words))
            config.typed(cfg, self.config_dirs)
        plain = cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))
        return id_of(plain), OmegaConf.create(plain)

    def _composed(self, words: Sequence[str]) -> DictConfig:
        """What Hydra composes of the words. Files take a third of a second to read and merge, so
        each choice of them is composed once, and values are put over a copy, as Hydra does.
        """
        parsed = OverridesParser.create().parse_overrides(list(words))
        files = tuple(str(o.input_line) for o in parsed if not _is_value(o))
        if files not in self.of_files:
            self.of_files[files] = self.hydra.compose_config(
                self.config_name, [*files, "hydra.mode=RUN"], RunMode.RUN
            )
        cfg = copy.deepcopy(self.of_files[files])
        hydra_app.put_over(cfg, [o for o in parsed if _is_value(o)])
        HydraConfig.instance().set_config(cfg)  # for `hydra:` interpolations
        return cfg


def _is_of_the_sweep(override: Override) -> bool:
    """Whether it says where the sweep lies and how it runs."""
    return override.key_or_group in ("recipe", "name") or _tells_how(override)


def _tells_how(override: Override) -> bool:
    """Whether it is of the sweep as a whole, or of Hydra."""
    return _first(override) in (*cards.OF_SWEEPS, "hydra")


def _first(override: Override) -> str:
    return override.key_or_group.split(".")[0]


def _refuse(override: Override) -> None:
    key = override.key_or_group
    if key in ELSEWHERE and not (key == "resume" and override.value() == "auto"):
        raise ConfigError(f"{override.input_line}: {ELSEWHERE[key]}")
    if override.is_sweep_override() and _tells_how(override):
        raise ConfigError(f"{override.input_line}: is of the whole sweep; give it one value.")


def _is_value(override: Override) -> bool:
    """Whether it sets a key of the composed configuration, and chooses no file."""
    key = override.key_or_group
    return (
        override.package is None
        and (key in cards.RUN_KEYS or "." in key)
        and (_first(override) != "hydra")
    )


def _swept(words: Sequence[Override]) -> dict[tuple[str, str | None], Dimension]:
    """What is swept, by its place; of words for the same place the last counts."""
    found: dict[tuple[str, str | None], Dimension] = {}
    for word in words:
        if word.is_sweep_override():
            found[_place(word)] = dimension(word)
        else:
            found.pop(_place(word), None)
    return found


def _place(override: Override) -> tuple[str, str | None]:
    return override.key_or_group, override.package


def _key(word: str) -> str:
    """The bare key of an override."""
    return word.lstrip("+~").partition("=")[0].strip()
