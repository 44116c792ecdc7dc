"""From the words of a command line to a checked, typed `Run`; and a run folder's `config.yaml`.

Every group goes to the dataclass that its `_target_` names and is checked strictly. What does not
fit is one error that names the key, what was given, what it takes, and the file that says so.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from peftcli import cards, folders, settings, written
from peftcli.errors import ConfigError, DataError, did_you_mean
from peftcli.imports import optional
from peftcli.suggest import nearest_keys
from peftcli.train.schedules import SCHEDULES
from peftcli.words import in_words

FILE = "config.yaml"
SECRET = re.compile(r"\$\{\s*oc\.env:\s*(\w*(?:TOKEN|KEY|SECRET|PASSW)\w*)", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a folder's name: no path can be smuggled in


def compose(overrides: Sequence[str] = (), config_dirs: Iterable[Path] = ()) -> DictConfig:
    """The configuration that `overrides` make of the defaults and of recipes (`+recipe=NAME`)."""
    from peftcli import (
        hydra_app,
    )  # a third of a second that members of a sweep and ranks do without

    return hydra_app.compose(overrides, list(config_dirs))


def save(cfg: DictConfig, run_dir: Path) -> Path:
    """Write `config.yaml`, resolved, whole or not at all."""
    run_dir.mkdir(parents=True, exist_ok=True)
    aside = run_dir / f".{FILE}"
    OmegaConf.save(cfg, aside, resolve=True)
    return aside.replace(run_dir / FILE)


def load(
    run_dir: Path, overrides: Sequence[str] = (), config_dirs: Iterable[Path] = ()
) -> DictConfig:
    """A run folder's configuration, with values and groups (`dataset=tweets`) put over it."""
    path = Path(run_dir) / FILE
    try:
        cfg = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"{run_dir}: is not a run folder, since it has no {FILE}.") from None
    except yaml.MarkedYAMLError as e:
        line = f", line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise DataError(f"{path}{line}: {e.problem}.") from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: cannot be read ({e}).") from None
    if not isinstance(cfg, DictConfig):
        raise DataError(f"{path}: holds no mapping of keys.")
    cfg["run_dir"] = str(run_dir)  # where it lies now
    tree: Any = OmegaConf.to_container(cfg)
    cfg = OmegaConf.create(written.completed(tree))
    if overrides:
        from peftcli import hydra_app

        cfg = hydra_app.override(cfg, overrides, list(config_dirs))
    return cfg


# -- Typed -----------------------------------------------------------------------------------------
def typed(cfg: DictConfig, config_dirs: Iterable[Path] = ()) -> settings.Run:
    """The checked `Run` of a configuration."""
    Check({}, list(config_dirs)).keys("", settings.Run, dict.fromkeys(map(str, cfg)))
    check = Check(resolved(cfg), list(config_dirs))
    wrong: list[str] = []
    values: dict[str, Any] = {}
    for part in ("", *cards.RUN_GROUPS):
        try:
            values |= check.group(part) if part else check.top()
        except ConfigError as e:
            wrong.append(str(e))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return settings.Run(**values)


def sweep_of(cfg: DictConfig, config_dirs: Iterable[Path] = ()) -> settings.Sweep:
    """The checked group `sweep` of a composed configuration; a primary file without one means the
    defaults.
    """
    group = OmegaConf.to_container(cfg.sweep, resolve=True) if "sweep" in cfg else None
    if group is None:
        return settings.Sweep()
    return Check({"sweep": group}, list(config_dirs)).group("sweep")["sweep"]


def method_of(values: Mapping[str, Any]) -> Any:
    """The checked method of a mapping with its `_target_`, as adapters' files hold it."""
    return Check({"method": dict(values)}, []).group("method")["method"]


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Plain values, every interpolation looked up and nothing missing. An environment variable that
    holds a secret is refused: the configuration is written down.
    """
    written = list(_leaves(OmegaConf.to_container(cfg, resolve=False)))
    for key, value in written:
        if isinstance(value, str) and (secret := SECRET.search(value)):
            raise ConfigError(
                f"{key}={value}: {secret[1]} looks like a secret, and configurations are written "
                "into run folders. Whoever needs it reads it from the environment itself."
            )
    try:
        tree = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as e:
        key, reason = e.full_key or "?", str(e).splitlines()[0]
        raise ConfigError(f"{key}={_raw(cfg, key)}: {reason}.") from None
    tree = typing.cast("dict[str, Any]", tree)
    wrong = [
        f"{key}={value}: must be a finite number."
        for key, value in _leaves(tree)
        if not _is_finite(value)
    ]
    missing = sorted(key for key, value in written if value == "???")
    if missing or wrong:
        check = Check(tree, [])
        raise ConfigError("\n".join([*map(check.must_be_given, missing), *wrong]))
    return tree


@dataclasses.dataclass(frozen=True)
class Check:
    """The checks of one configuration `tree`, whose files may be in the user's `config_dirs`."""

    tree: dict[str, Any]
    config_dirs: list[Path]

    def top(self) -> dict[str, Any]:
        """The keys outside of groups."""
        values = {name: self.tree[name] for name in cards.RUN_KEYS}
        self.values("", _top(), values)
        if not NAME.fullmatch(values["name"]):
            raise ConfigError(
                f"name={values['name']}: becomes a folder's name; letters, digits and . _ - only."
            )
        return values

    def group(self, group: str) -> dict[str, Any]:
        """{group: its dataclass}."""
        node = self.tree.get(group)
        if not isinstance(node, dict):
            raise ConfigError(
                f"{group}={_shown(node)}: is a group of keys; choose one of its files: "
                f"{self._choices(group)}."
            )
        values = dict(node)
        target = values.pop("_target_", None)
        if not isinstance(target, str):
            raise ConfigError(
                f"{group}._target_ is missing. Start from one of its files: {self._choices(group)}."
            )
        if group == "optimizer":
            return {group: self.optimizer(target, values)}
        base = None if group == "method" else _hints(settings.Command)[group]
        cls = self.target(
            group, target, ("peftcli.",) if base else ("peftcli.methods.",), base or None
        )
        made = self.checked(group, cls, values)
        if group == "scheduler":
            self.checked(f"{group}.kwargs", SCHEDULES[made.name], made.kwargs)
        return {group: made}

    def target(self, group: str, target: str, allowed: tuple[str, ...], base: type | None) -> type:
        """The class of a `_target_`: in an allowed package and of the group's kind."""
        packages = " or ".join(f"{package}*" for package in allowed)
        refusal = f"{group}._target_={target}: refused; it must be a class under {packages}."
        if not target.startswith(allowed) or not re.fullmatch(r"[\w.]+", target):
            raise ConfigError(refusal)
        module, _, name = target.rpartition(".")
        try:
            found = getattr(optional(module), name, None)
        except ModuleNotFoundError as e:
            if e.name == "bitsandbytes":
                raise ConfigError(
                    f"{target}: bitsandbytes is not installed: pip install 'peftcli[bitsandbytes]'"
                ) from None
            if not module.startswith(e.name or ""):
                raise
            raise ConfigError(f"{group}._target_={target}: there is no module {e.name}.") from None
        if not inspect.isclass(found) or (base and not issubclass(found, base)):
            kind = f" that is a {base.__name__}" if base else ""
            raise ConfigError(f"{group}._target_={target}: names no class{kind}.")
        if base is None and not dataclasses.is_dataclass(found):
            raise ConfigError(f"{group}._target_={target}: names no method.")
        return found

    def keys(self, where: str, cls: type, values: Mapping[str, Any]) -> None:
        """Refuse keys that `cls` does not have, and demand those without a default."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = [key for key in values if key not in known]
        if unknown:
            raise ConfigError(
                "\n".join(self._no_key(_join(where, key), list(known)) for key in unknown)
            )
        required = [
            n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING
        ]
        missing = [_join(where, name) for name in required if name not in values]
        if missing := [
            key for key in missing if key not in cards.GROUPS
        ]:  # groups are checked each by itself
            raise ConfigError("\n".join(map(self.must_be_given, missing)))
        for name, inner in _lists(cls).items():
            items = values.get(name)
            for i, item in enumerate(items if isinstance(items, list) else ()):
                if isinstance(item, dict):
                    self.keys(f"{_join(where, name)}[{i}]", inner, item)

    def checked(self, where: str, cls: type, values: Mapping[str, Any]) -> Any:
        """`cls` of the values, none unknown, none missing, each of its type."""
        self.keys(where, cls, values)
        return self.values(where, cls, values)

    def values(self, where: str, cls: type, values: Mapping[str, Any]) -> Any:
        """`cls` of the values, each strictly of its type and in its range.

        JSON's strictness: lists become tuples, whole numbers floats, and nothing else changes.
        """
        from pydantic import ValidationError

        try:
            return _adapter(cls).validate_json(json.dumps(values, default=str), strict=True)
        except ValidationError as e:
            hints = _hints(cls)
            wrong: dict[str, str] = {}
            for error in e.errors(include_url=False):
                if isinstance(told := error.get("ctx", {}).get("error"), ConfigError):
                    raise told from None  # the class itself said what is wrong
                key, value, hint = _locate(where, values, hints, error["loc"])
                wrong.setdefault(
                    key,
                    f"{key}={_shown(value)}: takes {in_words(hint)}."
                    f"{_near(value, hint)}{self.see(key)}",
                )
            raise ConfigError("\n".join(wrong.values())) from None

    def optimizer(self, target: str, values: dict[str, Any]) -> settings.Optimizer:
        """The optimizer's class with its own keyword arguments, checked against its signature.

        Ranges of its own are left to its constructor, which takes a second to import a compiler.
        """
        import torch

        cls = self.target("optimizer", target, settings.OPTIMIZERS, torch.optim.Optimizer)
        accepted = inspect.signature(cls).parameters
        own = {
            n: p
            for n, p in accepted.items()
            if n not in ("params", "lr", "head_lr", "weight_decay", "args", "kwargs")
        }
        if "lr" not in accepted or "weight_decay" not in accepted:
            raise ConfigError(
                f"optimizer._target_={target}: takes no lr and weight_decay, which all runs set."
            )
        allowed = ["lr", "head_lr", "weight_decay", *own]
        unknown = [k for k in values if k not in allowed]
        if unknown:
            raise ConfigError(
                "\n".join(self._no_key(f"optimizer.{key}", allowed) for key in unknown)
            )
        kwargs = {k: v for k, v in values.items() if k in own}
        for name, value in kwargs.items():
            if not _like(value, own[name].default):
                like = f"like its default {_shown(own[name].default)}"
                raise ConfigError(
                    f"optimizer.{name}={_shown(value)}: takes a value {like}."
                    f"{self.see(f'optimizer.{name}')}"
                )
        fields = {"cls": target, "kwargs": kwargs} | {
            k: v for k, v in values.items() if k not in own
        }
        return self.checked("optimizer", settings.Optimizer, fields)

    # -- Words -------------------------------------------------------------------------------------
    def _choices(self, group: str) -> str:
        return ", ".join(folders.choices(group, self.config_dirs))

    def _no_key(self, key: str, siblings: list[str]) -> str:
        where = key.rpartition(".")[0]
        mine = [_join(where, name) for name in siblings]
        others = [k for k in cards.all_keys(self.config_dirs) if k.rpartition(".")[0] != where]
        near = nearest_keys(key, [*mine, *cards.GROUPS, *others])
        if key == "recipe":
            return "the first line of a recipe must be: # @package _global_"
        meant = (
            f" Did you mean {' or '.join(near)}?"
            if near
            else f" Keys there: {', '.join(siblings)}."
        )
        return f"no key {key!r}.{meant}"

    def must_be_given(self, key: str) -> str:
        """What to type for a key that has no value."""
        return f"{key} has no value; give one: {key}=VALUE.{self.see(key)}"

    def see(self, key: str) -> str:
        """' (file: what the key means)' where a file documents it."""
        group, _, name = re.sub(r"\[\d+\].*", "", key).partition(".")
        card = self.card(group) if name else cards.root_card(self.config_dirs)
        documented = {k.name: k for k in card.keys} if card else {}
        if card is None or (name or group).split(".")[0] not in documented:
            return ""
        meaning = documented[(name or group).split(".")[0]].meaning
        return (
            f" ({folders.shown(card.path)}: {meaning})"
            if meaning
            else f" ({folders.shown(card.path)})"
        )

    def card(self, group: str) -> cards.Card | None:
        """The file that a group most likely came from: of its `_target_`, most alike in values."""
        node = self.tree.get(group)
        node = node if isinstance(node, dict) else {}
        same_class = [
            c for c in cards.cards(group, self.config_dirs) if c.target == node.get("_target_")
        ]
        return max(
            same_class,
            key=lambda c: sum(_written(k.default) == node.get(k.name) for k in c.keys),
            default=None,
        )


@cache
def _top() -> type:
    """The keys of `Run` outside of groups, as a dataclass."""
    hints = _hints(settings.Run)
    return dataclasses.make_dataclass("Top", [(name, hints[name]) for name in cards.RUN_KEYS])


@cache
def _adapter(cls: type) -> Any:
    """Pydantic's checks of a dataclass."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@cache
def _lists(cls: Any) -> dict[str, type]:
    """The keys of a dataclass that hold several of another."""
    inner = {
        name: next(iter(typing.get_args(hint)), None)
        for name, hint in typing.get_type_hints(cls).items()
    }
    return {name: kind for name, kind in inner.items() if dataclasses.is_dataclass(kind)}  # pyright: ignore[reportReturnType]


@cache
def _written(text: str) -> Any:
    """The value that a file's text stands for."""
    return yaml.safe_load(text) if text else None


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _join(where: str, key: Any) -> str:
    return f"{where}.{key}".lstrip(".")


def _raw(cfg: DictConfig, key: str) -> Any:
    """A value before interpolation."""
    node: Any = OmegaConf.to_container(cfg, resolve=False)
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _leaves(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, _join(where, key))
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from _leaves(value, f"{where}[{i}]")
    else:
        yield where, tree


def _locate(
    where: str, values: Any, hints: Mapping[str, Any], loc: Sequence[Any]
) -> tuple[str, Any, Any]:
    """(full key, value, type) of an error; tags of unions in its location are passed over."""
    key, value, hint = where, values, None
    for part in loc:
        if isinstance(value, list) and isinstance(part, int) and part < len(value):
            key, value, hint = f"{key}[{part}]", value[part], _inside(hint, tuple, 0)
        elif isinstance(value, dict) and part in value:
            fields = (
                hints if hint is None else _hints(hint) if dataclasses.is_dataclass(hint) else {}
            )
            key, value, hint = (
                _join(key, part),
                value[part],
                fields.get(str(part)) or _inside(hint, dict, 1),
            )
    return key, value, hint


def _inside(hint: Any, container: type, index: int) -> Any:
    """The type of a container's elements, also where the container is one of several choices."""
    for choice in (hint, *typing.get_args(hint)):
        if typing.get_origin(choice) is container:
            return typing.get_args(choice)[index]
    return Any


def _shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _near(value: Any, hint: Any) -> str:
    """The nearest word where words are to choose from; how to write a number as text."""
    words = [w.strip() for w in in_words(hint).split("|")]
    if isinstance(value, str):
        return did_you_mean(value, [w for w in words if " " not in w])
    return f" As text: \"'{value}'\"." if "text" in words and isinstance(value, int | float) else ""


def _like(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of an argument's default."""
    if default is None or default is inspect.Parameter.empty:
        return True
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, tuple):
        return (
            isinstance(value, list)
            and len(value) == len(default)
            and all(map(_like, value, default))
        )
    return isinstance(value, int | float if isinstance(default, int | float) else type(default))
