"""Laws of the configuration files: complete, in order, explained, equal to their dataclasses."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from peftcli import cards, folders, settings

FOLDER = folders.built_in("configs")
FILES = sorted(p for group in cards.GROUPS for p in (FOLDER / group).glob("*.yaml"))
# What a file is about: the keys that differ from the dataclass's defaults.
DIFFERS = {
    "scheduler/cosine": {"name"},
    "scheduler/constant": {"name"},
    "scheduler/constant_with_warmup": {"name", "warmup_ratio"},
    "scheduler/wsd": {"name", "warmup_ratio", "kwargs"},
    "quantization/nf4": {"name"},
    "quantization/fp4": {"name"},
    "quantization/int8": {"name"},
    "strategy/ddp": {"name"},
    "sweep/scaled": {"lr_scale"},
    "logger/tensorboard": {"name"},
    "logger/wandb": {"name"},
}
ABOUT_VALUES = {
    "model",
    "dataset",
}  # nearly all of their keys differ by file; they have laws of their own


def identity(path: Path) -> str:
    return str(path.relative_to(FOLDER).with_suffix(""))


def read(path: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def target(values: dict[str, Any]) -> Any:
    module, _, name = values.pop("_target_").rpartition(".")
    return getattr(importlib.import_module(module), name)


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("path", FILES, ids=identity)
def test_a_file_starts_with_its_command_and_explains_every_key(path: Path) -> None:
    group, choice = identity(path).split("/")
    text = path.read_text(encoding="utf-8")
    assert text.isascii()
    first = text.partition("\n")[0]
    assert first.startswith("# peft-train ")
    assert f"{group}={choice}" in first or (group, choice) == ("trainer", "default")
    card = cards.read_card(group, choice, path)
    assert card.command
    assert group == "method" or card.summary
    assert [key.name for key in card.keys if not key.meaning] == []


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent.name not in (*ABOUT_VALUES, "optimizer")], ids=identity
)
def test_a_file_holds_its_dataclass_s_fields_in_order_with_their_defaults(path: Path) -> None:
    values = read(path)
    fields = dataclasses.fields(target(values))
    assert list(values) == [field.name for field in fields]
    for field in fields:
        made = field.default_factory
        default = made() if made is not dataclasses.MISSING else field.default
        if field.name in DIFFERS.get(identity(path), ()):
            assert values[field.name] != plain(default), f"{field.name} does not differ"
        else:
            assert values[field.name] == plain(default), field.name


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "optimizer"], ids=identity)
def test_an_optimizer_file_holds_arguments_of_its_class(path: Path) -> None:
    values = read(path)
    parameters = inspect.signature(target(values)).parameters
    assert list(values)[:3] == ["lr", "head_lr", "weight_decay"]
    assert values["weight_decay"] == 0.0
    for name in list(values)[3:]:
        if name != "momentum":  # SGD without momentum is nobody's baseline
            assert values[name] == plain(parameters[name].default), name


def test_the_primary_file_holds_every_key_outside_of_groups_and_a_choice_of_every_group() -> None:
    assert [key.name for key in cards.root_card().keys] == list(cards.TOP_KEYS)
    assert all(key.meaning for key in cards.root_card().keys)
    chosen = cards.defaults()
    assert [group for group in chosen if group in cards.GROUPS] == list(cards.GROUPS)
    for group in cards.GROUPS:
        assert chosen[group] in folders.choices(group)


def test_groups_are_the_fields_of_a_run_and_of_a_sweep() -> None:
    assert (*cards.RUN_KEYS, *cards.RUN_GROUPS) == tuple(
        f.name for f in dataclasses.fields(settings.Run)
    )
    assert {*cards.TOP_KEYS, *cards.GROUPS} == {
        f.name for f in dataclasses.fields(settings.Command)
    }
    assert cards.OF_SWEEPS == ("sweep_dir", "sweep")
    folders_here = {p.name for p in FOLDER.iterdir() if p.is_dir()}
    assert folders_here == {*cards.GROUPS, "table"}  # published tables are files of many runs


def test_what_keys_take_is_known_of_every_group_but_optimizers() -> None:
    for key, files in cards.all_keys().items():
        for card, documented in files:
            if card.group != "optimizer" or documented.name in ("lr", "weight_decay"):
                assert documented.takes, f"{key} in {card.path}"
