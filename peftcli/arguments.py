"""What verbs read on their command lines: flags, a run's folder, keys and values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from peftcli.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from peftcli.settings import Run

FILE = "config.yaml"  # what makes a folder a run folder


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the whole usage."""
        raise ConfigError(f"{self.prog}: {message}. `{self.prog} --help` tells more.")


def run_parser(verb: str, purpose: str) -> Parser:
    """What these verbs share."""
    parser = Parser(
        prog=f"peft-train {verb}",
        usage=f"peft-train {verb} [RUN_FOLDER] [+recipe=NAME] [group=choice] [key=value] [flags]",
        description=purpose,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RUN_FOLDER, key=value",
        help="a run's folder, and what to change",
    )
    parser.add_argument(
        "-cd", "--config-dir", type=Path, help="a folder of your own with recipes/ and groups"
    )
    parser.add_argument("--json", action="store_true", help="the result as JSON on stdout")
    return parser


def configuration(args: argparse.Namespace) -> tuple[Run, DictConfig, Path | None]:
    """The run that the words mean: a folder's with changes, or one composed of them."""
    from peftcli import config

    dirs = [args.config_dir] if args.config_dir else []
    if args.words and is_run_folder(args.words[0]):
        folder = Path(args.words[0])
        cfg = config.load(folder, args.words[1:], dirs)
    else:
        folder, cfg = None, config.compose(args.words, dirs)
    return config.typed(cfg, dirs), cfg, folder


def is_run_folder(word: str) -> bool:
    """Whether a word is the folder of a run; another path is an error: nothing else looks so."""
    path = Path(word or "=")
    if (path / FILE).is_file():
        return True
    if path.is_dir():
        runs = [p.parent for depth in ("*", "*/*") for p in path.glob(f"{depth}/{FILE}")]
        hint = f" The newest in it: {max(runs, key=lambda p: p.stat().st_mtime)}" if runs else ""
        raise ConfigError(f"{word}: is not a run folder, since it has no {FILE}.{hint}")
    if "/" in word and "=" not in word:
        near = (
            did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
            if path.parent.is_dir()
            else ""
        )
        raise ConfigError(f"{word}: no such run folder.{near}")
    return False


def at_least(least: int) -> Callable[[str], int]:
    """The reader of a whole number from `least`."""

    def read(text: str) -> int:
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least}")
        return int(text)

    return read


positive = at_least(1)
