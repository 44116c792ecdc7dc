"""Exact numbers of trainable parameters, as papers print them or as their equations give them, on
models that are known by their dimensions alone.

One line a claim; a method is added by adding its lines. A fresh head is not counted.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
from omegaconf import OmegaConf
from transformers import PreTrainedConfig

from peftcli import cards, folders
from peftcli.core.host import Host
from peftcli.describe import by_role
from peftcli.export import adapter
from peftcli.models import load, tasks
from peftcli.settings import Model
from tests.conftest import Cli
from tests.laws.test_method_laws import make_method

ATTENTION_AND_MLP = ("q", "k", "v", "up", "down")

# (method, its options, model, trainable parameters)
COUNTS: list[tuple[str, dict[str, Any], str, int]] = [
    ("lora", {"r": 8}, "roberta_base", 294_912),
    ("lora", {"r": 8}, "roberta_large", 786_432),
    ("lora", {"r": 1}, "gpt3_175b", 4_718_592),
    ("lora", {"r": 8}, "gpt3_175b", 37_748_736),
    ("lora", {"r": 4}, "gpt2_medium", 393_216),
    ("lora", {"r": 32, "target_modules": ATTENTION_AND_MLP}, "llama2_7b", 56_098_816),
    ("lora", {"r": 32, "target_modules": ATTENTION_AND_MLP}, "llama31_8b", 56_623_104),
    ("full", {}, "llama2_7b", 6_738_415_616),
    ("full", {}, "gpt2", 124_439_808),
    ("hf_peft", {"config": {"r": 8}, "target_modules": ("q", "v")}, "roberta_base", 294_912),
    ("intrinsic_dimension", {"d": 207}, "roberta_large", 207),
    ("intrinsic_dimension", {"d": 322, "said": False}, "roberta_large", 322),
    (
        "hf_peft",
        {"peft_type": "IA3", "config": {"feedforward_modules": ["down_proj"]}},
        "llama2_7b",
        614_400,
    ),
]
# (model, all parameters, those of a language model's head with them where it is not tied)
SIZES = {
    "bert_base": 109_483_778,  # 109,482,240 with the pooler, and two classes
    "deberta_v3_base": 184_423_682,  # 183,831,552, a pooler of 590,592 and two classes
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt3_175b": 174_604_259_328,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama31_8b": 8_030_261_248,
    "llama32_1b": 1_235_814_400,
    "llama32_3b": 3_212_749_824,
    "mistral_7b": 7_248_023_552,
    "qwen25_0_5b": 494_032_768,
    "qwen25_1_5b": 1_543_714_304,
    "qwen25_3b": 3_085_938_688,
    "qwen25_7b": 7_615_616_512,
    "qwen3_0_6b": 596_049_920,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "vit_base": 85_800_194,  # 85,798,656 and two classes
}


@cache
def dimensions(model: str) -> PreTrainedConfig:
    path = folders.choices("model")[model]
    values = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(path)))
    return load.config_of(values["architecture"])


def host_of(model: str) -> Host:
    base = dimensions(model)
    return Host(load.empty_model(base, tasks.infer_task(Model(model), base, "auto")))


@pytest.mark.parametrize(
    ("method", "options", "model", "count"),
    COUNTS,
    ids=[f"{method}-{model}-{count}" for method, _, model, count in COUNTS],
)
def test_exactly_so_many_parameters_train(
    method: str, options: dict[str, Any], model: str, count: int
) -> None:
    host = host_of(model)
    host.add(make_method(method, **options))
    assert host.num_parameters()[0] == count == sum(by_role(host).values())


@pytest.mark.parametrize("model", SIZES)
def test_the_dimensions_are_those_of_the_model(model: str) -> None:
    assert host_of(model).num_parameters()[1] == SIZES[model]


@pytest.mark.parametrize("model", [c.choice for c in cards.cards("model") if c.choice != "local"])
def test_every_model_file_has_dimensions_on_which_lora_counts(model: str) -> None:
    host = host_of(model)
    host.add(make_method("lora"))
    roles = by_role(host)
    assert set(roles) == {"q", "v"}
    assert adapter.num_bytes(host, "default") >= 4 * sum(roles.values())


def test_roles_are_told_apart_in_fused_weights_shared_parts_and_the_base() -> None:
    host = host_of("gpt2")
    host.add(make_method("lora", r=2, target_modules=("q", "k")))
    assert by_role(host)["q"] == by_role(host)["k"] == 12 * 2 * 2 * 768
    host = host_of("gpt2")
    host.add(make_method("full"))
    assert by_role(host)["embed"] == 50257 * 768
    host = host_of("llama2_7b")
    host.add(make_method("hf_peft", peft_type="UNILORA"))
    assert set(by_role(host)) <= {"q", "v", "shared"}


# -- The verb --------------------------------------------------------------------------------------
def test_check_counts_where_there_are_no_weights(cli: Cli) -> None:
    done = json.loads(cli("check", "model=roberta_base", "method=lora", "--json").stdout)
    assert done["counts"] == {
        "trained_parameters": 294_912,
        "all_parameters": 124_647_170 + 294_912,
        "share": 294_912 / (124_647_170 + 294_912),
        "trained_by_role": {"q": 147_456, "v": 147_456},
        "sites": 24,
        "published_bytes": 4 * 294_912,
    }
    said = cli("check", "model=gpt3_175b", "method.r=1").stderr
    for part in ("4,718,592 parameters", "q 2,359,296", "left out", "memory and time"):
        assert part in said, said


def test_check_says_about_how_many_the_data_will_choose(cli: Cli) -> None:
    words = ["model=vit_base", "method=spt", "method.budget=200000"]
    counts = json.loads(cli("check", *words, "--json").stdout)["counts"]
    assert counts == {"trained_parameters_about": 200_000, "all_parameters": 85_800_194}
    assert "about 200,000 parameters" in cli("check", *words).stderr
    words.append("method.allocation={vit.layers.0.attention.q_proj: 7, vit.layernorm.bias: 0}")
    counts = json.loads(cli("check", *words, "--json").stdout)["counts"]
    assert counts["trained_parameters"] == 7 + 768 + 768  # the class token trains in any case
    assert "counts it exactly" not in cli("methods", "spt").stdout


def test_check_takes_dimensions_of_one_s_own(cli: Cli) -> None:
    words = ["model=local", "model.name_or_path=mine"]
    small = "model.architecture={model_type: llama, hidden_size: 64, num_hidden_layers: 2}"
    counts = json.loads(cli("check", *words, small, "--json").stdout)["counts"]
    assert counts["sites"] == 4
    wrong = "model.architecture={model_type: llama, hiden_size: 64}"
    assert "Did you mean hidden_size" in cli("check", *words, wrong, code=2).stderr
    wrong = "model.architecture={model_type: lama}"
    assert "Did you mean llama" in cli("check", *words, wrong, code=2).stderr


def test_training_without_weights_says_how_to_get_them(cli: Cli, tmp_path: Path) -> None:
    said = cli("model=gpt3_175b", f"run_dir={tmp_path / 'run'}", code=3).stderr
    assert "not in the hub's local cache" in said


def test_weights_that_are_here_are_checked_whole(cli: Cli, models: Path, chats: Path) -> None:
    words = ["+recipe=lora_llama_chat", f"model.name_or_path={models / 'llama'}"]
    words += [f"dataset.path={chats}", "dataset.eval_samples=6"]
    words += ["model.architecture={model_type: gpt2}"]
    blocks = json.loads(cli("check", *words, "--json").stdout)
    assert blocks.keys() == {"model", "data", "training"}
    assert "by role" in blocks["model"]
