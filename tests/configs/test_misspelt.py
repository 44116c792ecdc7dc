"""Every key misspelt by a letter, removed, null, of the wrong type: one message, the right hint."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from peftcli import cards, config, hydra_words
from peftcli.errors import ConfigError
from peftcli.suggest import nearest_keys

RUNS = ["+recipe=lora_llama", "method=full", "optimizer=sgd"]
WRONG: list[Any] = [None, "???", "no such word", -7.5, [["x"]], "${nothing}", float("nan")]


def misspellings(word: str) -> Iterator[str]:
    """All words with one letter dropped, doubled, swapped, or replaced by the next."""
    for i, letter in enumerate(word):
        other = chr((ord(letter) - ord("a") + 1) % 26 + ord("a"))
        yield word[:i] + word[i + 1 :]
        yield word[:i] + letter + word[i:]
        yield word[:i] + other + word[i + 1 :]
        yield word[:i] + word[i : i + 2][::-1] + word[i + 2 :]


def test_the_key_that_was_meant_is_suggested() -> None:
    """At least 95 of 100 misspellings name the right key first."""
    keys = hydra_words.known_keys([])
    wrong, total = [], 0
    for key in cards.all_keys():
        group, _, name = key.rpartition(".")
        for misspelt in sorted(set(misspellings(name)) - {name, ""}):
            given = f"{group}.{misspelt}".lstrip(".")
            if given in keys:
                continue
            total += 1
            if key not in nearest_keys(given, keys)[:1]:
                wrong.append((given, key))
    assert total > 2000
    assert len(wrong) / total < 0.05, wrong


def test_a_misspelt_group_is_suggested() -> None:
    keys = hydra_words.known_keys([])
    given = [(m, g) for g in cards.GROUPS for m in misspellings(g) if m not in keys]
    right = [g in nearest_keys(m, keys) for m, g in given]
    assert sum(right) / len(right) > 0.95


@pytest.fixture(scope="module", params=RUNS)
def case(request: pytest.FixtureRequest) -> tuple[dict[str, Any], list[tuple[str, ...]]]:
    """A configuration, and the keys to spoil in it: all, or those of the group that differs."""
    found = OmegaConf.to_container(config.compose([request.param]))
    assert isinstance(found, dict)
    tree = {str(key): value for key, value in found.items()}
    group = request.param.partition("=")[0]
    return tree, [place for place in places(tree) if group not in tree or place[0] == group]


def places(tree: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, inner) for inner in value)


def checked(tree: dict[str, Any]) -> str | None:
    """None where it is accepted, else the message; anything but a ConfigError escapes."""
    cfg = OmegaConf.create(tree)
    assert isinstance(cfg, DictConfig)
    try:
        config.typed(cfg)
    except ConfigError as e:
        return str(e)
    return None


def test_wrong_values_are_config_errors_that_name_the_key(case: Any) -> None:
    tree, keys = case
    for place in keys:
        for value in WRONG:
            changed = copy.deepcopy(tree)
            node = changed if len(place) == 1 else changed[place[0]]
            node[place[-1]] = value
            message = checked(changed)
            assert message is None or ".".join(place) in message, (place, value, message)


def test_removed_and_misspelt_keys_never_break_anything_else(case: Any) -> None:
    tree, keys = case
    for place in keys:
        for new_name in (None, f"{place[-1]}x"):
            changed = copy.deepcopy(tree)
            node = changed if len(place) == 1 else changed[place[0]]
            value = node.pop(place[-1])
            if new_name:
                node[new_name] = value
            message = checked(changed)
            if place[-1] == "_target_":
                continue
            assert new_name is None or (message is not None and new_name in message), place
