"""Sizes at which methods train about as many parameters, counted on models without weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from peftcli import config
from peftcli.errors import ConfigError
from peftcli.settings import Run
from peftcli.sweep.line import Composer
from peftcli.sweep.match import Scale, match, target_of
from tests.laws.test_method_laws import make_method

SMALL = (
    "++model.architecture={model_type: llama, vocab_size: 512, hidden_size: 96,"
    " intermediate_size: 192, num_hidden_layers: 3, num_attention_heads: 6, num_key_value_heads: 2}"
)
# (method, other options, about so many)
METHODS: list[tuple[str, dict[str, Any], int]] = [
    ("lora", {}, 11_000),
    ("dora", {}, 12_000),
    ("adalora", {}, 50_000),
    ("vera", {}, 1_300),
    ("loha", {}, 11_000),
    ("lokr", {}, 700),
    ("fourierft", {}, 2_000),
    ("hut", {}, 11_000),
    ("oft", {}, 3_000),
    ("boft", {}, 9_000),
    ("bottleneck_adapter", {}, 15_000),
    ("compacter", {}, 3_300),
    ("parallel_adapter", {}, 15_000),
    ("mam", {"prefix_mlp": False}, 40_000),
    ("prefix_tuning", {"prefix_projection": False}, 2_000),
    ("prompt_tuning", {}, 1_000),
    ("p_tuning", {}, 2_000),
    ("intrinsic_dimension", {}, 777),
    ("spiel", {}, 5_000),
    ("qwha", {"init": "plain"}, 30_000),
    ("partial", {}, 150_000),
]


@pytest.fixture(scope="module")
def llama() -> Run:
    """A run on a small Llama that has no weights."""
    composer = Composer()
    words = ["model=local", "model.name_or_path=none", SMALL]
    return config.typed(composer.member(words)[1])


@pytest.mark.parametrize(("name", "options", "target"), METHODS, ids=[m[0] for m in METHODS])
def test_the_size_is_within_one_step_of_the_target(
    llama: Run, name: str, options: dict[str, Any], target: int
) -> None:
    run = replace(llama, method=make_method(name, **options))
    found = match(run, str(target))
    key, _, text = found.override.partition("=")
    option, value = key.removeprefix("method."), int(text)
    scale = Scale(run, option)
    assert key == f"method.{run.method.size_option}"
    assert scale.count(value) == found.parameters
    distance = abs(found.parameters - target)
    for step in (-1, 1):  # the next values that the method takes, and that make a difference
        other = next(
            (
                n
                for v in range(value + step, value + 12 * step, step)
                if v > 0 and (n := scale.count(v))
            ),
            None,
        )
        assert other is None or abs(other - target) >= distance, (value, step, other)


@pytest.mark.parametrize("name", ["bitfit", "ia3", "ssf", "full", "lisa"])
def test_a_method_of_one_size_is_refused_with_the_reason(llama: Run, name: str) -> None:
    with pytest.raises(ConfigError, match="no option by which more or fewer"):
        match(replace(llama, method=make_method(name)), "1000")


def test_a_number_out_of_reach_names_the_nearest(llama: Run) -> None:
    run = replace(llama, method=make_method("prefix_tuning"))
    with pytest.raises(ConfigError, match=r"cannot train about 1,000 .*method\.prefix_length=1"):
        match(run, "1000")


@pytest.mark.parametrize(
    ("wanted", "number"), [("300k", 300_000), ("1.5M", 1_500_000), ("0.3%", 3_000), ("7", 7)]
)
def test_numbers_are_absolute_or_a_share_of_the_model(wanted: str, number: int) -> None:
    assert target_of(wanted, 1_000_000) == number


@pytest.mark.parametrize("wanted", ["0", "many", "-3", "0.3 percent"])
def test_other_words_are_refused(wanted: str) -> None:
    with pytest.raises(ConfigError, match="takes 300k"):
        target_of(wanted, 1_000_000)
