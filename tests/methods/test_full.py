"""What full fine-tuning promises: everything trains, decays by shape, in weights that keep small
updates; counts, and the change as a file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, GPT2Config, LlamaConfig, ViTConfig

from peftcli.core.host import Host
from peftcli.errors import ConfigError
from peftcli.methods.full import Full
from peftcli.models.load import empty_model
from tests import tiny
from tests.conftest import Cli


@pytest.mark.parametrize(
    ("config", "task", "head", "count"),
    [
        (LlamaConfig(intermediate_size=11008), "causal_lm", 0, 6_738_415_616),
        (BertConfig(vocab_size=28996), "classification", 1_538, 108_310_272),
        (ViTConfig(), "image_classification", 1_538, 85_798_656),
        (GPT2Config(), "causal_lm", 0, 124_439_808),
    ],
    ids=["llama-2-7b", "bert-base-cased", "vit-b-16", "gpt2"],
)
def test_everything_trains_and_a_tied_head_counts_once(
    config: Any, task: Any, head: int, count: int
) -> None:
    host = Host(empty_model(config, task, ("no", "yes")))
    host.add(Full())
    assert all(p.requires_grad for p in host.model.parameters())
    assert host.num_parameters() == (count + head, count + head)


@pytest.mark.parametrize(
    ("fields", "rest"),
    [
        ({"freeze": (r"\.mlp\.", "norm")}, ("mlp", "norm")),
        ({"train_embeddings": False}, ("wte",)),  # and the head, which is tied to them
        ({"train_head": False}, ("wte",)),
    ],
)
def test_what_is_frozen_rests(fields: dict[str, Any], rest: tuple[str, ...]) -> None:
    model = tiny.models()["llama" if "freeze" in fields else "gpt2"]()
    host = Host(model)
    host.add(Full(**fields))
    resting = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert resting == {n for n, _ in model.named_parameters() if any(r in n for r in rest)}


def test_a_pattern_of_nothing_and_quantised_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.freeze: 'mpl' is found in no parameter"):
        Host(tiny.llama()).add(Full(freeze=("mpl",)))
    with pytest.raises(ConfigError, match="few bits"):
        Host(tiny.quantised(tiny.llama(), "nf4")).add(Full())


def test_a_step_of_sgd_is_lr_times_the_gradient() -> None:
    host = Host(tiny.gpt2())
    host.add(Full())
    start = {n: p.detach().clone() for n, p in host.trained().items()}
    groups = host.adapters["default"].param_groups(host, 0.5, 0.0)
    optimizer = torch.optim.SGD(groups, lr=0.5)
    host.model(**tiny.batch("gpt2")).loss.backward()
    optimizer.step()
    for name, p in host.trained().items():
        torch.testing.assert_close(p, start[name] - 0.5 * p.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_is_that_of_adamw_which_decays_matrices_alone(dtype: torch.dtype) -> None:
    host, plain = Host(tiny.bert()), tiny.bert()
    host.add(Full())
    host.model.to(dtype), plain.to(dtype)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in plain.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    mine = host.adapters["default"].param_groups(host, 1e-2, 0.1)
    assert {g["weight_decay"]: {p.ndim >= 2 for p in g["params"]} for g in mine} == {
        0.1: {True},
        0.0: {False},
    }
    for model, parameters in ((host.model, mine), (plain, groups)):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(**tiny.batch("bert")).loss.backward()
            optimizer.step()
    for name, p in host.trained().items():
        torch.testing.assert_close(p, plain.get_parameter(name), atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize(
    ("weights", "update", "steps", "wanted"),
    [("none", 1e-3, 1, 1.0), ("none", 1e-2, 1, 1.0078125), ("fp32", 1e-3, 1000, 2.0)],
)
def test_small_updates_are_lost_in_bfloat16_and_add_up_in_float32(
    weights: Any, update: float, steps: int, wanted: float
) -> None:
    host = Host(tiny.llama().bfloat16())
    host.add(Full(master_weights=weights))
    norm = host.model.get_submodule("model.norm").weight  # ones
    assert norm.dtype == {"none": torch.bfloat16, "fp32": torch.float32}[weights]
    optimizer = torch.optim.SGD(host.adapters["default"].param_groups(host, update, 0.0), update)
    norm.grad = -torch.ones_like(norm)
    for _ in range(steps):
        optimizer.step()
    torch.testing.assert_close(norm.data, torch.full_like(norm, wanted), atol=1e-4, rtol=0)


def test_a_run_without_masters_trains_and_resumes_in_bfloat16(
    cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    words = [word for word in tiny_run if not word.startswith("method.")]
    words += ["method=full", "method.master_weights=none", "trainer.bf16=true"]
    words += ["optimizer.lr=1e-2", "trainer.max_steps=6"]
    cli("train", *words)
    saved = load_file(tmp_path / "run/adapter/model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}
    metrics = json.loads((tmp_path / "run/result.json").read_text())["train_info"]["metrics"]
    assert metrics["after"]["loss"] < 0.9 * metrics["before"]["loss"]
    cli("verify-resume", *words[:-1], f"run_dir={tmp_path / 'again'}", "--steps=2", "--stops=1")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_base_and_the_change_that_is_written_are_the_trained_model(
    method: str, cli: Cli, tiny_run: list[str], models: Path, tmp_path: Path
) -> None:
    words = [word for word in tiny_run if not word.startswith("method.")]
    run = [*words, f"method={method}", "trainer.max_steps=2", "optimizer.lr=1e-2"]
    run += ["trainer.bf16=false"]
    cli("train", *run, *(["method.target_modules=[q, v]"] if method == "lora" else []))
    told = cli("export", "run", "--to", "delta", "--output", "change", "--json").stdout
    cli("export", "run", "--output", "merged")
    change, merged, base = (
        load_file(tmp_path / "change/delta.safetensors"),
        load_file(tmp_path / "merged/model.safetensors"),
        load_file(models / "llama/model.safetensors"),
    )
    assert json.loads(told)["tensors_changed"] == len(change)
    assert len(change) == {"full": len(base), "lora": 2 * 3}[method]
    for name, W in merged.items():
        torch.testing.assert_close(base[name] + change.get(name, 0.0), W, atol=1e-7, rtol=1e-6)
