"""Adapters cross to stock Hugging Face peft and back with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from peftcli.core.host import Host
from peftcli.errors import DataError, NonFinite
from peftcli.export import adapter
from peftcli.methods.lora import LoRA
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's advice on its own options
TASKS = {
    "llama": "causal_lm",
    "gpt2": "causal_lm",
    "bert": "classification",
    "t5": "seq2seq",
    "vit": "image_classification",
}
VARIANTS = {
    "plain": LoRA(r=3),
    "everything": LoRA(r=3, alpha=5.0, target_modules="all-linear"),
    "rslora": LoRA(r=4, use_rslora=True),
    "patterns": LoRA(
        r=4, target_modules="all-linear", rank_pattern={"q": 2}, alpha_pattern={"down": 3.0}
    ),
    "pissa": LoRA(r=3, init="pissa"),
    "olora rslora": LoRA(r=3, init="olora", use_rslora=True),
    "all biases": LoRA(r=3, bias="all"),
    "biases of targets": LoRA(r=3, bias="lora_only"),
}


def trained(model: str, method: LoRA) -> Host:
    torch.manual_seed(5)
    host = Host(tiny.models()[model](), ["classifier"] if model == "bert" else [])
    host.add(method)
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.05 * torch.randn_like(p))
    return host


def outputs(model: torch.nn.Module, name: str) -> torch.Tensor:
    """In float64, where neither a processor's way of summing nor the order of sums is seen."""
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny.batch(name).items()}
    with torch.no_grad():
        return model.double().eval()(**batch).logits


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", TASKS)
def test_stock_peft_computes_the_same_with_our_adapter(
    model: str, variant: str, tmp_path: Path
) -> None:
    host = trained(model, VARIANTS[variant])
    adapter.save(host, "default", tmp_path, TASKS[model], "base")
    theirs = peft.PeftModel.from_pretrained(tiny.models()[model](), tmp_path)
    torch.testing.assert_close(
        outputs(theirs, model), outputs(host.model, model), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize(("use_rslora", "factor"), [(False, 2.0), (True, 2**0.5)])
def test_a_start_that_the_base_gave_away_is_exported_at_twice_the_rank_and_the_same_scale(
    use_rslora: bool, factor: float, tmp_path: Path
) -> None:
    host = trained("llama", LoRA(r=3, alpha=5.0, init="pissa", use_rslora=use_rslora))
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    config = adapter.read_config(tmp_path)
    assert config["r"] == 6
    assert config["lora_alpha"] == pytest.approx(5.0 * factor)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", TASKS)
def test_our_adapter_loads_again(model: str, variant: str, tmp_path: Path) -> None:
    host = trained(model, VARIANTS[variant])
    adapter.save(host, "default", tmp_path, TASKS[model], "base")
    again = Host(tiny.models()[model]())
    adapter.load(again, tmp_path)
    torch.testing.assert_close(
        outputs(again.model, model), outputs(host.model, model), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("model", TASKS)
def test_an_adapter_from_stock_peft_loads_here(model: str, tmp_path: Path) -> None:
    targets = {
        "bert": ["query", "value"],
        "vit": None,
        "gpt2": ["c_attn"],
        "llama": ["q_proj", "down_proj"],
        "t5": ["q", "v"],
    }
    names = targets[model] or sorted(
        {
            s.rsplit(".", 1)[-1]
            for s in Host(tiny.models()["vit"]()).layout.roles
            if s.endswith(("q_proj", "query"))
        }
    )
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=names, task_type=adapter.TASK_TYPES[TASKS[model]]
    )
    theirs = peft.get_peft_model(tiny.models()[model](), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    host = Host(tiny.models()[model]())
    adapter.load(host, tmp_path)
    torch.testing.assert_close(
        outputs(host.model, model), outputs(theirs, model), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_stock_peft_trained_load_here(bias: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query", "dense"], bias=bias, task_type="SEQ_CLS")  # pyright: ignore[reportArgumentType]
    theirs = peft.get_peft_model(tiny.bert(), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for p in (p for p in theirs.parameters() if p.requires_grad):
            p.add_(0.05 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    host = Host(tiny.bert())
    adapter.load(host, tmp_path)
    assert isinstance(host.adapters["default"], LoRA)
    torch.testing.assert_close(
        outputs(host.model, "bert"), outputs(theirs, "bert"), atol=1e-9, rtol=1e-9
    )


def test_embeddings_and_convolutions_cross_too(tmp_path: Path) -> None:
    for model, targets in {
        "llama": ("embed", "q"),
        "vit": (r".*patch_embeddings\.projection",),
    }.items():
        host = trained(model, LoRA(r=2, target_modules=targets))
        adapter.save(host, "default", tmp_path / model, TASKS[model], "base")
        theirs = peft.PeftModel.from_pretrained(tiny.models()[model](), tmp_path / model)
        torch.testing.assert_close(
            outputs(theirs, model), outputs(host.model, model), atol=1e-9, rtol=1e-9
        )


def test_the_written_file_is_the_same_each_time(tmp_path: Path) -> None:
    host = trained("llama", LoRA())
    for name in ("a", "b"):
        adapter.save(host, "default", tmp_path / name, "causal_lm", "base")
    a, b = ((tmp_path / n / adapter.WEIGHTS).read_bytes() for n in ("a", "b"))
    assert a == b


def test_an_adapter_with_a_number_that_is_not_finite_is_not_published(tmp_path: Path) -> None:
    host = trained("llama", LoRA())
    with torch.no_grad():
        next(iter(host.trained().values()))[0, 0] = float("nan")
    with pytest.raises(NonFinite, match="not published"):
        adapter.save(host, "default", tmp_path, "causal_lm", "base")
    assert not (tmp_path / adapter.WEIGHTS).exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter.save(trained("llama", LoRA()), "default", tmp_path, "causal_lm", "base")
    return tmp_path


def refused(folder: Path, match: str) -> None:
    with pytest.raises(DataError, match=match):
        adapter.load(Host(tiny.models()["llama"]()), folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    weights = folder / adapter.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(folder, "is damaged")


def test_missing_and_unknown_tensors_are_refused(folder: Path) -> None:
    tensors = load_file(folder / adapter.WEIGHTS)
    key = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != key}, folder / adapter.WEIGHTS)
    refused(folder, "lacks 1 tensors")
    save_file(
        {**tensors, "base_model.model.x.lora_A.weight": torch.zeros(1)}, folder / adapter.WEIGHTS
    )
    refused(folder, "has unknown 1 tensors")


def test_options_that_are_not_supported_are_named(folder: Path) -> None:
    config = json.loads((folder / adapter.CONFIG).read_text())
    (folder / adapter.CONFIG).write_text(json.dumps({**config, "layer_replication": [[0, 2]]}))
    refused(folder, "layer_replication")
    (folder / adapter.CONFIG).write_text(json.dumps({**config, "peft_type": "XLORA"}))
    refused(folder, "XLORA cannot train here")
    (folder / adapter.CONFIG).write_text(json.dumps({**config, "peft_type": "LORAX"}))
    refused(folder, "no such tuner. Did you mean")


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, "adapter_config.json is missing")
