"""What FourierFT promises: its start, peft's positions, counts, rates, and both ways to peft."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, RobertaConfig

from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.site import Site
from peftcli.export import adapter
from peftcli.methods.fourierft import FourierFT, FourierFTDelta
from peftcli.models.load import empty_model
from peftcli.settings import Optimizer
from peftcli.train.optim import make_optimizer
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def site_of(module: nn.Module) -> Site:
    d_out, d_in = weights.shape(module)
    return Site("m", module, weights.kind_of(module), d_in, d_out)


@pytest.mark.parametrize(("d", "scaling", "printed"), [(768, 150, 0.0057), (4096, 300, 0.0004)])
def test_the_start_has_the_deviation_of_the_formula(d: int, scaling: float, printed: float) -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        linear = nn.Linear(d, d)
    dW = FourierFT(scaling=scaling).build(site_of(linear)).delta(linear.weight)
    assert dW.std().item() == pytest.approx(scaling * 500**0.5 / d**2, rel=0.1)
    assert dW.std().item() == pytest.approx(printed, rel=0.1)


def test_init_weights_starts_at_the_base() -> None:
    linear = nn.Linear(12, 8)
    delta = FourierFT(n=5, init_weights=True).build(site_of(linear))
    x = torch.randn(3, 12)
    assert torch.equal(delta(x, Bare(linear, nn.Linear)), linear(x))


def test_positions_are_those_of_peft() -> None:
    linear = nn.Linear(24, 16)
    stock = peft.get_peft_model(
        nn.Sequential(linear), peft.FourierFTConfig(n_frequency=40, target_modules=["0"])
    )
    theirs = stock.base_model.model[0].indices["default"]
    delta = FourierFT(n=40).build(site_of(linear))
    assert torch.equal(torch.stack([delta.positions // 24, delta.positions % 24]), theirs)


@pytest.mark.parametrize(
    "module", [nn.Linear(6, 10), nn.Conv2d(4, 6, 3, padding=1), nn.Embedding(11, 6)]
)
def test_the_folded_weight_gives_the_same_output(module: nn.Module) -> None:
    torch.manual_seed(0)
    delta = FourierFT(n=20, scaling=10.0).build(site_of(module))
    layer = Bare(module.requires_grad_(False), type(module))
    x = {nn.Linear: torch.randn(2, 3, 6), nn.Conv2d: torch.randn(2, 4, 5, 5)}.get(
        type(module), torch.tensor([[1, 4], [10, 0]])
    )
    W, b = delta.merged(layer.weight, layer.bias)
    torch.testing.assert_close(layer.linear(x, W, b), delta(x, layer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "task", "targets", "wanted"),
    [
        (RobertaConfig(), "classification", ("query", "value"), 24_000),
        (
            RobertaConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
            "classification",
            ("query", "value"),
            48_000,
        ),
        (GPT2Config(n_embd=1024, n_layer=24, n_head=16), "causal_lm", ("q", "v"), 48_000),
        (LlamaConfig(), "causal_lm", ("q", "v"), 64_000),
    ],
    ids=["roberta-base", "roberta-large", "gpt2-medium", "llama2-7b"],
)
def test_n_numbers_a_layer(config: object, task: str, targets: tuple, wanted: int) -> None:
    host = Host(empty_model(config, task))
    host.add(FourierFT(target_modules=targets))
    assert host.num_parameters()[0] == wanted


def test_small_layers_train_all_entries_and_patterns_set_single_numbers() -> None:
    host = Host(tiny.llama())
    host.add(FourierFT(n=600, n_pattern={r"layers\.1\.self_attn\.q_proj": 7}))
    counts = {s.path: d.coefficients.numel() for s, d in host.deltas()}
    assert counts["model.layers.0.self_attn.q_proj"] == 600
    assert counts["model.layers.0.self_attn.v_proj"] == 16 * 32
    assert counts["model.layers.1.self_attn.q_proj"] == 7


def test_heads_may_have_a_rate_of_their_own_and_coefficients_decay() -> None:
    host = Host(tiny.bert(), ["classifier"])
    host.add(FourierFT(n=50))
    settings = Optimizer("torch.optim.AdamW", 0.05, 0.01, head_lr=6e-3)
    mine, *rest = make_optimizer(settings, host.adapters["default"], host).param_groups
    assert {g["lr"] for g in rest} == {6e-3}
    assert (mine["lr"], mine["weight_decay"]) == (0.05, 0.01)
    assert {p for g in rest for p in g["params"]} == set(host.model.classifier.parameters())
    assert all(isinstance(d, FourierFTDelta) for _, d in host.deltas())
    assert set(mine["params"]) == {d.coefficients for _, d in host.deltas()}


VARIANTS = {
    "plain": ("llama", FourierFT(n=100, scaling=20.0)),
    "zero and patterns": (
        "llama",
        FourierFT(n=300, scaling=9.0, seed=3, init_weights=True, n_pattern={"o": 11},
                  target_modules="all-linear"),
    ),
    "saturated": ("bert", FourierFT(n=1500, target_modules=("q", "up"))),
    "transposed": ("gpt2", FourierFT(n=70, scaling=20.0, target_modules=("o", "down"))),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_go_to_stock_peft_and_come_back(variant: str, tmp_path: Path) -> None:
    model, method = VARIANTS[variant]
    make = tiny.models()[model]
    host = Host(make(), ["classifier"] if model == "bert" else [])
    torch.manual_seed(3)
    host.add(method)
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(torch.randn_like(p) * 0.1)
    batch = tiny.batch(model)
    with torch.no_grad():
        ours = host.model(**batch).logits
    task = "classification" if model == "bert" else "causal_lm"
    adapter.save(host, "default", tmp_path / "ours", task, "base")
    stock = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, ours, atol=1e-5, rtol=1e-4)
    stock.save_pretrained(tmp_path / "theirs")
    again = Host(make())
    adapter.load(again, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, ours, atol=1e-5, rtol=1e-4)


def test_fused_roles_keep_our_own_format() -> None:
    host = Host(tiny.gpt2())
    host.add(FourierFT(n=20))
    assert "whole linear layers" in (host.adapters["default"].hf_refuses(host, "default") or "")
