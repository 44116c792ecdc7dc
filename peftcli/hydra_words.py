"""What Hydra, OmegaConf and YAML raise, in one message that says what to type."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from peftcli import cards, folders
from peftcli.errors import OF_DISKS, ConfigError, UserError, did_you_mean
from peftcli.suggest import nearest_keys

VERBS = (
    *("train", "check", "eval", "generate", "export", "verify-resume"),  # take overrides
    *("methods", "explain", "doctor", "table", "diff", "report", "plot"),
)


@contextmanager
def our_words(
    overrides: Sequence[str], config_dirs: Sequence[Path], cfg: DictConfig | None = None
) -> Iterator[None]:
    """Turn what Hydra, OmegaConf and YAML raise into one message that says what to type."""
    try:
        yield
    except UserError:
        raise
    except (
        HydraException,
        OmegaConfBaseException,
        YAMLError,
        UnicodeDecodeError,
        ValueError,
        OSError,
    ) as e:
        if isinstance(e, OSError) and e.errno in OF_DISKS:
            raise
        raise ConfigError(_in_our_words(e, overrides, config_dirs, cfg)) from e


def _in_our_words(
    e: BaseException, overrides: Sequence[str], config_dirs: Sequence[Path], cfg: DictConfig | None
) -> str:
    if isinstance(e, OverrideParseException):
        return _unreadable(e.override)
    if isinstance(e, MarkedYAMLError):
        return _broken_yaml(e)
    if isinstance(e, UnicodeDecodeError):
        return f"{_not_utf8(config_dirs)}: is not UTF-8 text ({e})."
    if isinstance(e, MissingConfigException):
        return _no_such_choice(e, config_dirs)
    text = str(e)
    if match := re.search(r"Could not (?:override|delete|append)[^']*'([^']*)'", text):
        return _no_such_key(match[1], text, overrides, config_dirs, cfg)
    if match := re.match(r"Override (\S+) looks like a config group", text):
        return _no_such_key(
            match[1].lstrip("+~").split("=")[0].split("@")[0], text, overrides, config_dirs, cfg
        )
    if match := re.search(r"Multiple values for (\S+)\. To override", text):
        return (
            f"{match[1]} is chosen twice; to choose another one, write {match[1]}=NAME without +."
        )
    if match := re.match(r"Ambiguous value for argument '(.*)'", text):
        key, _, value = match[1].partition("=")
        return (
            f"{match[1]}: a sweep over values needs -m; a list is '{key}=[{value}]';"
            f" text with a comma is \"{key}='{value}'\"."
        )
    if "Config group override must be" in text:
        return _not_a_choice(overrides, config_dirs)
    if match := re.match(r"invalid literal for int\(\) with base 10: '(.*)'", text):
        key = next(
            (
                o.partition("=")[0].removesuffix(f".{match[1]}")
                for o in overrides
                if f".{match[1]}" in o
            ),
            "a list",
        )
        return f"{key} is a list; give it whole: '{key}=[a,b]'."
    causes = [str(c) for c in (e, e.__cause__) if c is not None and str(c)]
    lines = [line.strip() for text in causes for line in text.splitlines() if line.strip()]
    return (
        "; ".join(line for line in lines if not line.startswith("object_type=")) or type(e).__name__
    )


def _unreadable(line: str) -> str:
    word = line.lstrip("+~")
    if word.endswith((".yaml", ".yml")) and "=" not in word:
        return (
            f"{line!r}: a recipe is chosen by its name. Put the file into a folder named recipes"
            f" and type peft-train --config-dir FOLDER_ABOVE +recipe={Path(word).stem}"
        )
    if re.fullmatch(r"[\w-]+", word):
        return (
            f"{line!r} is neither a verb nor key=value.{did_you_mean(word, VERBS)}"
            f" Verbs: {', '.join(VERBS)};"
            f" an option is written {(nearest_keys(word, known_keys([]), 1) or ['key'])[0]}=VALUE."
        )
    return (
        f"cannot read {line!r}: an option is key=value, a list is 'key=[a,b]', and a value with"
        " spaces or any of"
        f" ,:{{}}[]()$= stands in quotes of its own inside the shell's: \"key='a, b'\"."
    )


def _broken_yaml(e: MarkedYAMLError) -> str:
    mark = e.problem_mark or e.context_mark
    where = f"{folders.shown(Path(mark.name))}, line {mark.line + 1}: " if mark else ""
    return f"{where}{e.problem or e.context}."


def _not_utf8(config_dirs: Sequence[Path]) -> str:
    for folder in config_dirs:
        for path in folder.rglob("*.yaml"):
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                return folders.shown(path)
    return "a configuration file"


def _no_such_choice(e: MissingConfigException, config_dirs: Sequence[Path]) -> str:
    """A group's file, or the primary one, that does not exist."""
    group, _, given = (e.missing_cfg_file or "").rpartition("/")
    place = re.match(r"In '([^']+)': ", str(e))
    within = f"{place[1]}: " if place and place[1] != cards.ROOT else ""
    if not group:
        if given not in known_keys(config_dirs):
            searched = ", ".join(map(folders.shown, folders.config_folders(config_dirs)))
            return f"{within}no file {given}.yaml in {searched}."
        return f"{within}{given}: needs a choice: {', '.join(folders.choices(given, config_dirs))}."
    options = e.options or []
    if not options:
        return f"{within}no group {group!r}.{_meant(group, config_dirs)}"
    if group == "method" and (said := cards.known(given, config_dirs)):
        return f"{within}method={given}: {said}"
    near = did_you_mean(given, options)
    return f"{within}{group}={given}: no such choice.{near} All: {', '.join(options)}."


def _not_a_choice(overrides: Sequence[str], config_dirs: Sequence[Path]) -> str:
    """`trainer=3`: a group wants one of its files."""
    for line in overrides:
        group, _, given = line.lstrip("+").partition("=")
        options = folders.choices(group, config_dirs) if group in cards.GROUPS else {}
        if options and given not in options:
            return f"{line}: no such choice. All: {', '.join(options)}."
    return "the choice of a group is a name."


def _no_such_key(
    key: str,
    text: str,
    overrides: Sequence[str],
    config_dirs: Sequence[Path],
    cfg: DictConfig | None,
) -> str:
    if "already at" in text:
        return f"+{key}: exists already; leave out the +."
    if not key:
        return _unreadable(next((o for o in overrides if o.startswith("=")), "="))
    place = re.match(r"In '([^']+)': ", text)
    within = f"{place[1]}: " if place else ""
    if "delete" in text and not place:
        within = f"~{key}: "
    return f"{within}{no_key(key, config_dirs, chosen(overrides, cfg))}"


def chosen(overrides: Sequence[str], cfg: DictConfig | None = None) -> dict[str, str]:
    """The choice of every group as far as the command line tells; of a run folder, nothing."""
    given = {} if cfg is not None else cards.defaults()
    for line in overrides:
        key, _, value = line.lstrip("+").partition("=")
        if key in cards.GROUPS:
            given[key] = value
    return given


def known_keys(config_dirs: Sequence[Path]) -> list[str]:
    """All keys, and the groups themselves."""
    return [*cards.GROUPS, "recipe", *cards.all_keys(config_dirs)]


def no_key(key: str, config_dirs: Sequence[Path], choices: dict[str, str] | None = None) -> str:
    """'no key X', what was probably meant, and which other choice of the group has it."""
    files = cards.all_keys(config_dirs).get(key, [])
    if files:
        having = ", ".join(f"{card.group}={card.choice}" for card, _ in files)
        now = (
            f"{files[0][0].group}={choices[files[0][0].group]}"
            if choices and files[0][0].group in choices
            else "this choice"
        )
        return f"no key {key!r} in {now}; only {having}."
    return f"no key {key!r}.{_meant(key, config_dirs)}"


def _meant(key: str, config_dirs: Sequence[Path]) -> str:
    keys = known_keys(config_dirs)
    near = nearest_keys(key, keys)
    if near:
        return f" Did you mean {' or '.join(near)}?"
    group = key.partition(".")[0]
    siblings = [k for k in keys if k.startswith(f"{group}.")]
    if siblings:
        return f" Keys of {group}: {', '.join(k.partition('.')[2] for k in siblings)}."
    return f" Groups: {', '.join(cards.GROUPS)}; `peft-train explain GROUP` lists their keys."


def unknown_flag(flag: str, words: Sequence[str]) -> str:
    """What to type instead of `--learning_rate 1e-4`."""
    key, _, value = flag.lstrip("-").partition("=")
    near = nearest_keys(key.replace("-", "_"), known_keys([]))
    if not near:
        return f"unknown flag {flag}. `peft-train --help` lists what there is."
    following = [
        word
        for word in words[words.index(flag) + 1 :][:1]
        if not word.startswith("-") and "=" not in word
    ]
    return (
        f"unknown flag {flag}: options are written {near[0]}={value or (following or ['VALUE'])[0]}"
    )
