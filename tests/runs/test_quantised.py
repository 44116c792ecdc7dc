"""Runs on a base in 4 or 8 bits: what is stored how, what trains, what merging changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peftcli.core import weights
from peftcli.models.load import Loaded, load_model
from peftcli.models.source import resolve
from peftcli.settings import Model, Quantization, Task
from tests import packer
from tests.conftest import Cli, signalled

BITS = {"nf4": 4, "fp4": 4, "int8": 8}


def loaded(models: Path, folder: str, task: Task, **options: Any) -> Loaded:
    cfg = Model(str(models / folder))
    source = resolve(cfg, models)
    labels = ("no", "yes") if task == "classification" else None
    quantization = Quantization(**options)
    return load_model(
        source, cfg, task, dtype=torch.float32, labels=labels, quantization=quantization
    )


@pytest.mark.parametrize("kind", BITS)
def test_the_linears_of_the_blocks_are_stored_in_few_bits(kind: str, models: Path) -> None:
    model: Any = loaded(models, "llama", "causal_lm", name=kind, skip_modules=("k_proj",)).model
    stored = {path: weights.bits(m) for path, m in model.named_modules() if hasattr(m, "weight")}
    assert stored["model.layers.0.self_attn.q_proj"] == BITS[kind]
    assert stored["model.layers.2.mlp.down_proj"] == BITS[kind]
    assert stored["model.layers.0.self_attn.k_proj"] is None
    assert stored["lm_head"] is None
    assert stored["model.embed_tokens"] is None
    plain = loaded(models, "llama", "causal_lm").model
    sizes = [sum(weights.sizes(m).values()) for m in (model, plain)]
    assert sizes[0] == sizes[1]
    assert model.get_memory_footprint() < plain.get_memory_footprint()


def test_a_new_head_is_not_quantised(models: Path) -> None:
    found = loaded(models, "bert", "classification", name="nf4")
    assert found.new_modules
    for path in found.new_modules:
        module = found.model.get_submodule(path)
        assert all(p.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize("kind", BITS)
def test_a_run_on_few_bits_learns_and_publishes(
    kind: str, cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    words = [*tiny_run, f"quantization={kind}", "optimizer.lr=1e-2"]
    shown = cli(*words, "run_dir=whole").stderr
    assert kind in shown
    first, *_, last = losses(tmp_path / "whole")
    assert last < first
    assert (tmp_path / "whole" / "adapter").exists()
    again = json.loads(cli("eval", "whole", "--json").stdout)["metrics"]
    after = json.loads((tmp_path / "whole" / "result.json").read_text())["train_info"]["metrics"]
    assert again["loss"] == pytest.approx(after["after"]["loss"], abs=1e-5)


def test_a_run_on_few_bits_that_was_stopped_ends_the_same(
    cli: Cli, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*tiny_run, "quantization=nf4"]
    cli(*words, "run_dir=whole")
    signalled(monkeypatch, 3)
    cli(*words, "run_dir=parts", code=75)
    cli(*words, "run_dir=parts")
    file = "adapter/adapter_model.safetensors"
    whole, parts = (load_file(tmp_path / folder / file) for folder in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_merging_says_onto_what_and_what_it_changed(
    cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    cli(*tiny_run, "quantization=nf4", "optimizer.lr=1e-2", "run_dir=run")
    change = {}
    for onto in ("dequantised", "original", "requantised"):
        words = ["export", "run", "--to", "merged", "--onto", onto, "--output", onto, "--json"]
        change[onto] = json.loads(cli(*words).stdout)
        assert change[onto]["onto"] == onto
    assert change["dequantised"]["max_abs_difference"] < 1e-4
    assert change["dequantised"]["same_prediction"] == 1.0
    assert change["original"]["max_abs_difference"] > 1e-3
    assert change["requantised"]["max_abs_difference"] > 1e-3
    read = {o: AutoModelForCausalLM.from_pretrained(tmp_path / o) for o in change}
    stored = {o: weights.bits(m.model.layers[0].mlp.up_proj) for o, m in read.items()}
    assert stored == {"dequantised": None, "original": None, "requantised": 4}


@pytest.fixture
def stored(models: Path, tmp_path: Path) -> Path:
    """The tiny Llama's folder with its linears in nf4."""
    folder = tmp_path / "stored"
    loaded(models, "llama", "causal_lm", name="nf4").model.save_pretrained(folder)
    for path in (models / "llama").iterdir():
        if not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)
    return folder


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [r["loss"] for r in map(json.loads, lines) if "loss" in r]


def test_a_model_whose_files_hold_few_bits_trains_as_one_that_is_quantised_on_the_way(
    cli: Cli, tiny_run: list[str], stored: Path, tmp_path: Path
) -> None:
    tiny_run += ["trainer.max_steps=3", "trainer.bf16=false"]  # quantised from the same numbers
    there = [*tiny_run, f"model.name_or_path={stored}"]
    assert "nf4 (21 linears)" in " ".join(cli(*there, "run_dir=there").stderr.split())
    cli(*tiny_run, "quantization=nf4", "run_dir=made")
    assert losses(tmp_path / "there") == pytest.approx(losses(tmp_path / "made"), abs=1e-5)
    merge = ["export", "there", "--to", "merged", "--output", "merged"]
    assert "no other weights are there" in cli(*merge, "--onto", "original", code=2).stderr
    cli(*merge)
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert weights.bits(read.model.layers[0].mlp.up_proj) is None


def test_a_run_on_gptq_is_checked_stopped_and_goes_on_bit_for_bit(
    cli: Cli, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packer.checkpoint(tmp_path / "model", "llama", "gptq", order=True)
    there = [*tiny_run, f"model.name_or_path={tmp_path / 'model'}", "trainer.max_steps=4"]
    words = [*there, "optimizer.lr=1e-2"]
    plan = " ".join(cli("check", *words).stderr.split())
    assert "gptq (21 linears), the rest " in plan
    cli(*words, "run_dir=whole")
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]
    signalled(monkeypatch, 2)
    cli(*words, "run_dir=parts", code=75)
    cli(*words, "run_dir=parts")
    file = "adapter/adapter_model.safetensors"
    whole, parts = (load_file(tmp_path / folder / file) for folder in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    bare = [word for word in there if not word.startswith("method.")]
    for words, said in (
        ([*bare, "quantization=nf4"], "is stored in gptq already"),
        ([*bare, "strategy=fsdp"], "cannot cut up weights that are stored in gptq"),
        ([*bare, "method=full"], "is stored in gptq: Full changes the base's own weights"),
        ([*there, "method.init=loftq"], "needs the weights that the base was quantised from"),
    ):
        assert said in cli("check", *words, code=2).stderr


def test_a_run_on_awq_answers_and_is_merged_into_what_its_bits_mean(
    cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    packer.checkpoint(tmp_path / "model", "llama", "awq")
    there = f"model.name_or_path={tmp_path / 'model'}"
    cli(*tiny_run, there, "trainer.max_steps=2", "optimizer.lr=1e-2", "run_dir=run")
    cli("generate", "run", "--prompt", "what is 3 plus one", "--max-new-tokens", "3")
    merge = ["export", "run", "--to", "merged", "--output", "merged", "--json"]
    for onto in ("original", "requantised"):
        assert "--onto dequantised" in cli(*merge, "--onto", onto, code=2).stderr
    change = json.loads(cli(*merge).stdout)
    assert change["onto"] == "dequantised"
    assert change["max_abs_difference"] < 1e-4
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert weights.bits(read.model.layers[0].mlp.up_proj) is None


def test_a_model_whose_files_hold_few_bits_is_never_read_as_another(
    cli: Cli, tiny_run: list[str], stored: Path
) -> None:
    words = [*tiny_run, f"model.name_or_path={stored}"]
    assert "stored in nf4 already" in cli(*words, "quantization=int8", code=2).stderr
    assert "is stored in nf4: Full" in cli(*words[:-3], words[-1], "method=full", code=2).stderr
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    (stored / "config.json").write_text(json.dumps(config))
    assert "is stored in hqq, which is not read here" in cli(*words, code=2).stderr


def test_what_cannot_be_is_said(cli: Cli, tiny_run: list[str], tmp_path: Path) -> None:
    full = cli(*tiny_run[:-2], "method=full", "quantization=nf4", "run_dir=x", code=2).stderr
    assert "quantization=nf4" in full
    assert "quantization=none" in full
    skipped = [*tiny_run, "quantization=int8", "quantization.skip_modules=[k_prj]"]
    assert "k_prj" in cli(*skipped, code=2).stderr
    cli(*tiny_run, "run_dir=plain")
    words = ["export", "plain", "--to", "merged", "--onto", "original", "--output", "y"]
    assert "--onto" in cli(*words, code=2).stderr
