"""Liger's forms of a base model's norms, rotation and gates, under every method."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.llama import modeling_llama

from peftcli.errors import ConfigError
from peftcli.kernels import choice
from peftcli.models import liger
from tests import tiny
from tests.conftest import Cli
from tests.laws.test_method_laws import METHODS, adapted, backward

pytest.importorskip("liger_kernel")
PIECES = ["LlamaMLP", "LlamaRMSNorm", "apply_rotary_pos_emb"]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """What Triton's interpreter lacks for Liger's kernels: types of numbers, and libdevice."""
    if choice.IS_INTERPRETED:
        from liger_kernel.ops import geglu, rms_norm
        from triton.runtime import interpreter

        convert = interpreter._implicit_cvt

        def typed(value: Any) -> Any:
            if not isinstance(value, float):
                return convert(value)
            handle = interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)

        monkeypatch.setattr(interpreter, "_implicit_cvt", typed)
        monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
        monkeypatch.setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)
    with choice.using("auto", device):
        yield


def base(device: torch.device) -> PreTrainedModel:
    model = tiny.models()["llama"]().to(device)
    assert liger.use_liger(model, device) == PIECES
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_gradients_of_the_reference(method: str, device: torch.device) -> None:
    host = adapted(method, "llama", base=base(device))
    for module in host.model.modules():
        if hasattr(module, "dropout"):  # each form draws its own
            module.dropout = 0.0
    found = backward(host, "llama")
    with choice.using("reference", device):
        wanted = backward(host, "llama")
    scale = max(g.abs().max().item() for g in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale)


SIZES = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4},
    "granite": {},
    "llama": {},
    "mistral": {},
    "mixtral": {"num_local_experts": 2},
    "olmo2": {},
    "olmo3": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "smollm3": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, device: torch.device) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    found = liger.use_liger(model, device)
    assert any("Norm" in name for name in found)
    batch = {k: v.to(device) for k, v in tiny.batch("llama").items()}
    losses, gradients = [], []
    for kernels in ("auto", "reference"):
        model.zero_grad()
        with choice.using(kernels, device):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*losses)
    scale = max(g.abs().max().item() for g in gradients[1])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5 * scale)


def test_the_source_of_a_model_stays_as_it_was(device: torch.device) -> None:
    norm, rotate = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb
    model = base(device)
    assert modeling_llama.LlamaRMSNorm is norm
    assert isinstance(model.model.norm, norm)
    assert repr(model) == repr(tiny.models()["llama"]())
    now = modeling_llama.apply_rotary_pos_emb
    assert getattr(now, "plain", None) is getattr(rotate, "plain", rotate)
    twin = copy.deepcopy(model)
    with choice.using("reference", device):
        plain = tiny.models()["llama"]().to(device)(**tiny.batch("llama")).logits
        assert torch.equal(twin(**tiny.batch("llama")).logits, plain)


def test_float64_keeps_the_family_s_own_form(device: torch.device) -> None:
    model = base(device).double()
    plain = tiny.models()["llama"]().to(device).double()
    assert torch.equal(model(**tiny.batch("llama")).logits, plain(**tiny.batch("llama")).logits)


def test_require_names_what_is_missing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.models()["llama"]()
    with monkeypatch.context() as without, choice.using("require", device):
        without.setattr(liger, "HAS_LIGER", False)
        with pytest.raises(ConfigError, match=r"liger-kernel is not installed .*\[liger\]"):
            liger.use_liger(model, device)
    config = AutoConfig.for_model("gemma3_text", **SIZES, head_dim=8)
    strange = AutoModelForSequenceClassification.from_config(config)
    before = dict(vars(modeling_gemma3))
    with (
        choice.using("require", device),
        pytest.raises(ConfigError, match="take Gemma3Text"),
    ):
        liger.use_liger(strange, device)
    assert liger.use_liger(strange, device) == []
    assert dict(vars(modeling_gemma3)) == before
    assert not any("forward" in vars(m) for m in strange.modules())


def test_a_run_says_what_is_liger_s(cli: Cli, tiny_run: list[str]) -> None:
    quick = ("trainer.max_steps=1", "trainer.bf16=false", "dataset.eval_samples=1")
    done = cli(*tiny_run, *quick, "trainer.rehearse=false", "trainer.longest_first=false")
    assert "LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb" in done.stdout + done.stderr
