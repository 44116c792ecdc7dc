"""Where the files of configurations and recipes lie: ours, and those of a user's `--config-dir`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from peftcli.errors import ConfigError

PACKAGE = Path(__file__).parent
_TARGET = re.compile(r"^_target_:\s*(\S+)", re.MULTILINE)


def built_in(kind: Literal["configs", "recipes"]) -> Path:
    """The folder that comes with us: in the installed package, or beside it in a checkout."""
    installed = PACKAGE / kind
    return installed if installed.is_dir() else PACKAGE.parent / kind


def config_folders(config_dirs: Iterable[Path] = ()) -> list[Path]:
    """Folders of groups, the user's first: what they add wins."""
    return [*config_dirs, built_in("configs")]


def recipe_folders(config_dirs: Iterable[Path] = ()) -> list[Path]:
    """Folders of recipes; in a user's folder both `recipe/` and `recipes/` may hold them."""
    theirs = [folder / name for folder in config_dirs for name in ("recipe", "recipes")]
    return [p for p in (*theirs, built_in("recipes")) if p.is_dir()]


def recipes(config_dirs: Iterable[Path] = ()) -> dict[str, Path]:
    """Every recipe by its name."""
    return _by_name(recipe_folders(config_dirs))


def choices(group: str, config_dirs: Iterable[Path] = ()) -> dict[str, Path]:
    """The files of a group by their names."""
    return _by_name(folder / group for folder in config_folders(config_dirs))


def targets(group: str, config_dirs: Iterable[Path] = ()) -> dict[str, str]:
    """The class that each choice of a group makes, by the choices' names in their order."""
    found = {}
    for choice, path in sorted(choices(group, config_dirs).items()):
        target = _TARGET.search(text_of(path))
        found[choice] = target[1] if target else ""
    return found


def _by_name(folders: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            found.setdefault(str(path.relative_to(folder).with_suffix("")), path)
    return found


def text_of(path: Path) -> str:
    """What a file says. Raises `ConfigError` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{shown(path)}: cannot be read ({e}).") from None


def shown(path: Path) -> str:
    """A path as the user would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
