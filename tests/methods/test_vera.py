"""What VeRA promises: the random pair, counts, a dense reference, peft's format."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, PreTrainedConfig, RobertaConfig

from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.errors import ConfigError
from peftcli.export import adapter
from peftcli.methods.vera import Projections, VeRA, VeRADelta
from peftcli.models.load import empty_model
from tests import tiny
from tests.export.test_hf_peft import TASKS, outputs
from tests.methods.test_loha import site_of

ROBERTA_LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}


def moved(model: str, method: VeRA) -> Host:
    host = Host(tiny.models()[model](), ["classifier"] if model == "bert" else [])
    host.add(method)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in host.trained().values():
            p.normal_(std=0.3)
    return host


def test_a_key_gives_the_worked_pair_whatever_the_global_seed() -> None:
    for seed in (1, 2):
        torch.manual_seed(seed)
        pair = Projections(2, 3, 2, 0)
        wanted = torch.tensor([-0.0106, 0.7586, -1.1640])
        torch.testing.assert_close(pair.A[0], wanted, atol=5e-5, rtol=0)
        torch.testing.assert_close(pair.B[0], torch.tensor([-0.0343, 1.3733]), atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "task", "r", "count"),
    [
        (RobertaConfig(), "classification", 1024, 43_008),
        (RobertaConfig(**ROBERTA_LARGE), "classification", 256, 61_440),
        (GPT2Config(n_embd=1024, n_layer=24, n_head=16), "causal_lm", 1024, 98_304),
        (GPT2Config(n_embd=1280, n_layer=36, n_head=20), "causal_lm", 1024, 165_888),
    ],
    ids=["roberta-base", "roberta-large", "gpt2-medium", "gpt2-large"],
)
def test_counts_of_the_paper(config: PreTrainedConfig, task: str, r: int, count: int) -> None:
    host = Host(empty_model(config, task))
    before = host.num_parameters()[1]
    host.add(VeRA(r=r))
    assert host.num_parameters() == (count, before + count)


def test_the_pair_is_as_large_as_the_largest_layer_and_kept_once() -> None:
    host = moved("llama", VeRA(r=5, target_modules="all-linear"))
    pair = {n: t for n, t in host.state().items() if n.endswith((".A", ".B"))}
    assert {tuple(t.shape) for t in pair.values()} == {(5, 48), (48, 5)}
    assert len(pair) == 2
    assert not any(t.requires_grad for t in pair.values())
    assert not pair.keys() & host.trained().keys()


def test_layers_start_at_a_tenth_and_zero() -> None:
    host = Host(tiny.models()["llama"]())
    host.add(VeRA(r=4))
    for _, delta in host.deltas():
        assert torch.equal(delta.d, torch.full((4,), 0.1))
        assert not delta.b.any()


def test_a_layer_uses_the_corner_of_the_pair() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4).double()
    pair = Projections(3, 8, 9, 7).double()
    delta = VeRADelta(site_of(linear), pair, 0.1, 0.0).double()
    delta.b.data.normal_()
    x = torch.randn(5, 6, dtype=torch.float64)
    dW = torch.diag(delta.b) @ pair.B[:4] @ torch.diag(delta.d) @ pair.A[:, :6]
    layer = Bare(linear.requires_grad_(False), nn.Linear)
    W, b = delta.merged(layer.weight, layer.bias)
    torch.testing.assert_close(W, linear.weight + dW)
    torch.testing.assert_close(delta(x, layer), x @ W.T + b)
    G = torch.randn(5, 4, dtype=torch.float64)
    dense = torch.autograd.grad(x @ W.T + b, (delta.b, delta.d), G)
    branch = torch.autograd.grad(delta(x, layer), (delta.b, delta.d), G)
    torch.testing.assert_close(branch, dense)


def test_dropout_acts_on_the_branch_while_training_alone() -> None:
    linear = nn.Linear(64, 8)
    layer, x = Bare(linear, nn.Linear), torch.randn(3, 64)
    delta = VeRADelta(site_of(linear), Projections(4, 64, 8, 0), 0.1, 0.5).eval()
    delta.b.data.fill_(1.0)
    assert torch.equal(delta(x, layer), delta(x, layer))
    delta.train()
    assert not torch.equal(delta(x, layer), delta(x, layer))
    delta.b.data.zero_()
    assert torch.equal(delta(x, layer), linear(x))


def test_an_embedding_is_refused() -> None:
    host = Host(tiny.models()["llama"]())
    with pytest.raises(ConfigError, match=r"model\.embed_tokens is of kind embedding"):
        host.add(VeRA(target_modules=("embed", "q")))
    assert not host.adapters


def test_without_saved_projections_the_key_gives_them_again(tmp_path: Path) -> None:
    for model in ("llama", "gpt2"):  # peft's format, and our own
        host = moved(model, VeRA(r=6, prng_key=5, save_projection=False))
        adapter.save(host, "default", tmp_path / model, "causal_lm", "base")
        again = Host(tiny.models()[model]())
        adapter.load(again, tmp_path / model)
        assert not any(n.endswith((".A", ".B")) for n in again.state())
        torch.testing.assert_close(outputs(again.model, model), outputs(host.model, model))


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's advice on its own options
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(
    ("model", "targets"),
    [("llama", "all-linear"), ("bert", "all-linear"), ("gpt2", ("c_attn",)), ("t5", ("q", "v"))],
)
def test_stock_peft_computes_the_same_and_our_file_loads_again(
    model: str, targets: str | tuple[str, ...], saved: bool, tmp_path: Path
) -> None:
    method = VeRA(r=6, prng_key=3, target_modules=targets, save_projection=saved)
    host = moved(model, method)
    adapter.save(host, "default", tmp_path, TASKS[model], "base")
    ours = outputs(host.model, model)
    theirs = peft.PeftModel.from_pretrained(tiny.models()[model](), tmp_path)
    torch.testing.assert_close(outputs(theirs, model), ours, atol=1e-5, rtol=1e-5)
    again = Host(tiny.models()[model]())
    adapter.load(again, tmp_path)
    torch.testing.assert_close(outputs(again.model, model), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's advice on its own options
@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(
    ("model", "names"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"])]
)
def test_an_adapter_from_stock_peft_loads_here(
    model: str, names: list[str], saved: bool, tmp_path: Path
) -> None:
    config = peft.VeraConfig(
        r=5, projection_prng_key=11, target_modules=names, save_projection=saved
    )
    theirs = peft.get_peft_model(tiny.models()[model](), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "vera_lambda" in n:
                p.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)
    host = Host(tiny.models()[model]())
    adapter.load(host, tmp_path)
    ours: Tensor = outputs(host.model, model)
    torch.testing.assert_close(ours, outputs(theirs, model), atol=1e-5, rtol=1e-5)
