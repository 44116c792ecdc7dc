"""Every key misspelt by a letter, removed, null, of the wrong type: one message, the right hint."""

from __future__ import annotations

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
def case(request: pytest.FixtureRequest) -> tuple[DictConfig, list[tuple[str, ...]]]:
    """A configuration, and the keys to spoil in it: all, or those of the group that differs."""
    cfg = config.compose([request.param])
    OmegaConf.set_struct(cfg, False)
    group = request.param.partition("=")[0]
    return cfg, [p for p in places(container(cfg)) if group not in cfg or p[0] == group]


def container(cfg: DictConfig) -> dict[str, Any]:
    found = OmegaConf.to_container(cfg)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def places(tree: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, inner) for inner in value)


def spoilt(cfg: DictConfig, place: tuple[str, ...], values: dict[str, Any]) -> str | None:
    """With `values` in the place of a key: None where that is accepted, else the message; anything
    but a ConfigError escapes.
    """
    node = cfg if len(place) == 1 else cfg[place[0]]
    kept = node._get_node(place[-1])
    del node[place[-1]]
    for key, value in values.items():
        node[key] = value
    try:
        config.typed(cfg)
    except ConfigError as e:
        return str(e)
    finally:
        for key in values:
            del node[key]
        node[place[-1]] = kept
    return None


def test_wrong_values_are_config_errors_that_name_the_key(case: Any) -> None:
    cfg, keys = case
    for place in keys:
        for value in WRONG:
            message = spoilt(cfg, place, {place[-1]: value})
            assert message is None or ".".join(place) in message, (place, value, message)


def test_removed_and_misspelt_keys_never_break_anything_else(case: Any) -> None:
    cfg, keys = case
    for place in keys:
        node = container(cfg)
        value = node[place[0]] if len(place) == 1 else node[place[0]][place[1]]
        spoilt(cfg, place, {})
        message = spoilt(cfg, place, {f"{place[-1]}x": value})
        if place[-1] != "_target_":
            assert message is not None, place
            assert f"{place[-1]}x" in message, place


def test_a_spoilt_configuration_is_whole_again() -> None:
    cfg = config.compose([RUNS[0]])
    OmegaConf.set_struct(cfg, False)
    before = config.typed(cfg)
    assert spoilt(cfg, ("method", "r"), {"r": -1}) is not None
    assert spoilt(cfg, ("method",), {}) is not None
    assert config.typed(cfg) == before
