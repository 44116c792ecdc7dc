"""`peft-train methods`: what is said of every method is true of it, and is chosen by."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml

from peftcli import cards, folders, traits
from peftcli.core.host import Host
from peftcli.errors import ConfigError, NotApplicable
from tests import tiny
from tests.conftest import Cli
from tests.laws.test_method_laws import METHODS, make_method

FAMILIES = {
    *("low-rank", "structured", "scale-shift", "selective", "sparse", "adapter", "prompt"),
    "bridge",
}
KNOWN = yaml.safe_load((folders.PACKAGE / "known_methods.yaml").read_text())


def traits_of(method: str) -> traits.Traits:
    return traits.traits(cards.find_method(method).target)


@pytest.mark.parametrize("method", METHODS)
def test_traits_read_off_the_source_are_those_of_the_class(method: str) -> None:
    read, made = traits_of(method), make_method(method)
    assert read.family == made.family
    assert read.family in FAMILIES
    assert read.quantisable == type(made).on_quantised
    assert (read.exports == "model") == made.publishes_model
    if read.exports.startswith("peft "):
        assert read.exports == f"peft {made.peft_type}"


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_called_mergeable_where_it_merges_on_some_model(method: str) -> None:
    assert traits_of(method).mergeable == any(merges(method, model) for model in ("llama", "bert"))


def merges(method: str, model: str) -> bool:
    """Whether the method folds on the model; what trains the base itself has nothing to fold."""
    torch.manual_seed(0)
    host = Host(tiny.models()[model]())
    try:
        host.add(make_method(method), data=tiny.Look(host.model, model))
        host.adapters["default"].before_merge(host, "default")
        if host.sites.get("default"):
            host.merge()
    except NotApplicable:
        return False
    except ConfigError as e:
        assert "does not fold" in str(e)  # noqa: PT017
        return False
    return True


def names(cli: Cli, *flags: str) -> set[str]:
    return {m["name"] for m in json.loads(cli("methods", *flags, "--json").stdout)}


def test_what_an_option_takes_is_said_in_words() -> None:
    takes = {(c.choice, k.name): k.takes for c in cards.cards("method") for k in c.keys}
    assert not [key for key, said in takes.items() if "[" in said.partition("like ")[0] or not said]
    assert takes["lisa", "always_on"] == "a list of embed | norm | head"
    assert takes["bottleneck_adapter", "scale"] == "a number | learned | channel | null"


def test_methods_are_chosen_by_their_traits(cli: Cli) -> None:
    everything = names(cli)
    assert {"lora", "full", "hf_peft"} <= everything
    assert "lora" in names(cli, "--family", "low-rank", "--mergeable", "--quantisable")
    assert "full" not in names(cli, "--quantisable")
    assert names(cli, "--mergeable") | names(cli, "--no-mergeable") == everything
    assert not names(cli, "--mergeable") & names(cli, "--no-mergeable")
    assert {"lora", "hf_peft"} <= names(cli, "--exports", "peft")
    assert names(cli, "--exports", "LORA") >= {"lora"}
    assert names(cli, "--exports", "model") >= {"full"}
    assert names(cli, "--pre-pass") | names(cli, "--no-pre-pass") == everything
    assert {"lora", "qwha", "spt"} <= names(cli, "--pre-pass")
    assert not {"dora", "adalora", "lamda", "vera"} & names(cli, "--pre-pass")  # use LoRA's parts
    assert everything - names(cli, "--modality", "image") == {"prompt_tuning"}
    assert names(cli, "--family", "nothing") == set()


def test_one_method_has_equation_source_options_and_what_it_goes_with(cli: Cli) -> None:
    page = cli("methods", "lora").stdout
    for part in (
        "y = W x + b + s B A x",
        "arXiv 2106.09685",
        "a whole number >= 1",
        "folds into the weights",
        "peft LORA",
        "peft-train check model=llama2_7b method=lora",
    ):
        assert part in page
    assert cli("methods", "LoRA").stdout == page
    (data,) = [m for m in json.loads(cli("methods", "--json").stdout) if m["name"] == "lora"]
    assert data["mergeable"] is data["quantisable"] is True
    assert data["modalities"] == ["text", "image"]


@pytest.mark.parametrize("title", KNOWN)
def test_a_method_of_the_literature_is_answered_with_the_nearest(title: str) -> None:
    kind, idea, nearest = KNOWN[title]
    assert kind in FAMILIES
    assert idea
    assert nearest
    (near,) = re.findall(r"Nearest: (\w+);", cards.known(title))
    assert near in METHODS


def test_a_known_method_is_answered_wherever_it_is_named(cli: Cli) -> None:
    assert "Nearest: lora" in cli("methods", "qlora", code=2).stderr
    said = cli("train", "method=adapter_fusion", code=2).stderr
    assert "method=adapter_fusion: AdapterFusion (adapter: mixes" in said
    assert "Did you mean lora" in cli("methods", "lroa", code=2).stderr
