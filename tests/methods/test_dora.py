"""What DoRA's paper promises: worked numbers, the fast norm, gradients, counts, peft's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig

from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.export import adapter
from peftcli.kernels.dropout import dropout
from peftcli.methods.dora import DoRA, DoRADelta, MagnitudeDelta
from peftcli.methods.lora import LoRA
from peftcli.methods.low_rank import LowRank
from peftcli.models.load import empty_model
from tests import tiny

PAPER = ("q", "k", "v", "up", "down")


def site_of(module: nn.Module) -> Site:
    d_out, d_in = weights.shape(module)
    groups = getattr(module, "groups", 1)
    return Site("m", module, weights.kind_of(module), d_in, d_out, groups=groups)


def moved(module: nn.Module, **options: Any) -> tuple[Bare, DoRADelta]:
    """The module with a delta away from its start, in float64."""
    torch.manual_seed(0)
    module.double().requires_grad_(False)
    method = DoRA(**{"r": 4, "alpha": 6.0, "dropout": 0.0, **options})
    delta = method.build(site_of(module)).double()
    with torch.no_grad():
        for p in delta.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return Bare(module, type(module)), delta.eval()


def dense(delta: DoRADelta, W: Tensor, detach: bool = True) -> Tensor:
    """diag(m / ||V||) V with V = W + s B A, as the paper writes it."""
    V = W + delta.lora.delta(W)
    norm = V.norm(dim=1, keepdim=True)
    return delta.m[:, None] * V / (norm.detach() if detach else norm)


def test_a_changed_weight_has_new_norms() -> None:
    """||W_i|| of a frozen weight is kept, and made anew when the weight is written."""
    linear, x = nn.Linear(6, 5), torch.randn(3, 6, dtype=torch.float64)
    layer, delta = moved(linear)
    for factor in (1.0, 3.0):
        with torch.no_grad():
            linear.weight.mul_(factor)
        expected = x @ dense(delta, linear.weight).T + linear.bias
        for _ in range(2):
            torch.testing.assert_close(delta(x, layer), expected)


def test_the_worked_example() -> None:
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    delta = DoRA(r=1, alpha=2.0).build(site_of(linear))
    torch.testing.assert_close(delta.m, torch.tensor([5.0, 2.0]))
    with torch.no_grad():
        delta.lora.B.copy_(torch.tensor([[1.0], [0.5]]))
        delta.lora.A.copy_(torch.tensor([[1.0, -1.0]]))
    wanted = torch.tensor([[4.642383, 1.856953], [1.414214, 1.414214]])
    torch.testing.assert_close(delta.merged(linear.weight, None)[0], wanted)


MODULES = {
    "linear": nn.Linear(12, 8),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "1d": nn.Conv1d(4, 6, 5, padding=2, bias=False),
    "embedding": nn.Embedding(11, 8),
}


def an_input(module: nn.Module) -> Tensor:
    if isinstance(module, nn.Embedding):
        return torch.tensor([[1, 4], [10, 0]])
    if isinstance(module, nn.Linear):
        return torch.randn(3, 12).double()
    return torch.randn(2, 4, *[9] * len(module.kernel_size)).double()


@pytest.mark.parametrize("kind", MODULES)
def test_the_fast_norm_is_the_dense_one_and_the_rows_are_m_long(kind: str) -> None:
    layer, delta = moved(MODULES[kind])
    W = layer.weight
    torch.testing.assert_close(delta.norm(W), (W + delta.lora.delta(W)).norm(dim=1))
    torch.testing.assert_close(delta.merged(W, None)[0].norm(dim=1), delta.m.abs())


@pytest.mark.parametrize("kind", MODULES)
def test_it_folds_and_unfolds(kind: str) -> None:
    layer, delta = moved(MODULES[kind])
    x, W = an_input(layer.module), layer.weight
    folded, b = delta.merged(W, layer.bias)
    assert b is layer.bias
    torch.testing.assert_close(delta(x, layer), layer.linear(x, folded, b))
    torch.testing.assert_close(folded / delta.gain(W)[:, None] - delta.lora.delta(W), W)


@pytest.mark.parametrize("kind", MODULES)
def test_it_starts_at_the_base(kind: str) -> None:
    module = MODULES[kind].float()
    layer, x = Bare(module, type(module)), an_input(module)
    x = x.float() if x.is_floating_point() else x
    for delta in (DoRA().build(site_of(module)), MagnitudeDelta(site_of(module), True)):
        torch.testing.assert_close(delta.eval()(x, layer), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_are_those_of_the_dense_formula(detach: bool) -> None:
    layer, delta = moved(nn.Linear(12, 8), detach_norm=detach)
    x, gy = torch.randn(5, 12).double(), torch.randn(5, 8).double()
    parameters = [delta.m, delta.lora.A, delta.lora.B]
    ours = torch.autograd.grad((delta(x, layer) * gy).sum(), parameters)
    for d in (detach, not detach):
        y = x @ dense(delta, layer.weight, d).T + layer.bias
        wanted = torch.autograd.grad((y * gy).sum(), parameters)
        same = [torch.allclose(a, b) for a, b in zip(ours, wanted, strict=True)]
        assert same == [True, d == detach, d == detach]


def test_gradients_have_their_closed_form() -> None:
    layer, delta = moved(nn.Linear(12, 8))
    x, gy = torch.randn(5, 12).double(), torch.randn(5, 8).double()
    (delta(x, layer) * gy).sum().backward()
    W, A, B, s = layer.weight, delta.lora.A, delta.lora.B, delta.lora.scale
    V = W + s * B @ A
    c = V.norm(dim=1)
    dV = (delta.m / c)[:, None] * (gy.T @ x)
    torch.testing.assert_close(delta.m.grad, (gy * (x @ V.T)).sum(0) / c)
    torch.testing.assert_close(A.grad, s * B.T @ dV)
    torch.testing.assert_close(B.grad, s * dV @ A.T)


def test_an_embedding_moves_its_rows() -> None:
    layer, delta = moved(nn.Embedding(11, 8))
    E = layer.module.weight + delta.lora.scale * delta.lora.A.T @ delta.lora.B.T
    E = E * delta.m / E.norm(dim=0)
    torch.testing.assert_close(delta(torch.arange(11), layer), E)


def test_dropout_spares_the_layers_own_output() -> None:
    layer, delta = moved(nn.Linear(12, 8), dropout=0.5)
    x = torch.randn(4, 12).double()
    assert torch.equal(delta(x, layer), delta(x, layer))
    delta.train()
    torch.manual_seed(1)
    y = delta(x, layer)
    torch.manual_seed(1)
    dropped = dropout(x, 0.5)
    change = delta.merged(layer.weight, None)[0] - layer.weight
    torch.testing.assert_close(y, layer(x) + dropped @ change.T)


# -- counts ----------------------------------------------------------------------------------------
def llama(version: int) -> nn.Module:
    """LLaMA-7B, or LLaMA3-8B, without weights."""
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32)
    config.intermediate_size = 11008 if version == 1 else 14336
    config.num_key_value_heads = 32 if version == 1 else 8
    config.vocab_size = 32_000 if version == 1 else 128_256
    return empty_model(config, "causal_lm")


@pytest.mark.parametrize(
    ("version", "method", "count"),
    [
        (1, DoRA(), 56_975_360),
        (1, DoRA(r=16), 28_925_952),
        (3, DoRA(), 57_409_536),
        (
            1,
            DoRA(
                target_modules=("q", "k", "v"), magnitude_only_modules=("o", "gate", "up", "down")
            ),
            26_525_696,
        ),
    ],
    ids=["7B", "7B half", "8B", "7B magnitudes"],
)
def test_the_papers_counts(version: int, method: DoRA, count: int) -> None:
    host = Host(llama(version))
    host.add(method)
    assert host.num_parameters()[0] == count
    rank = method.r
    sites = [site for site, d in host.deltas() if isinstance(d, DoRADelta)]
    every = sum(site.d_out for site, _ in host.deltas())
    assert count == sum(rank * (s.d_in + s.d_out) for s in sites) + every


@pytest.mark.parametrize(
    ("version", "method", "printed"),
    [
        (1, LoRA(r=32, target_modules=PAPER), 0.83),
        (1, DoRA(), 0.84),
        (1, DoRA(r=16), 0.43),
        (
            1,
            DoRA(
                target_modules=("q", "k", "v"), magnitude_only_modules=("o", "gate", "up", "down")
            ),
            0.39,
        ),
        (3, LoRA(r=32, target_modules=PAPER), 0.70),
        (3, DoRA(), 0.71),
    ],
)
def test_the_papers_shares_are_of_base_and_adapter(
    version: int, method: LowRank, printed: float
) -> None:
    host = Host(llama(version))
    host.add(method)
    trained, every = host.num_parameters()
    assert round(100 * trained / every, 2) == printed


# -- options ---------------------------------------------------------------------------------------
def test_magnitudes_alone_keep_the_directions_and_fold(tmp_path: Path) -> None:
    method = DoRA(r=2, target_modules=("q",), magnitude_only_modules=("o", "down"))
    torch.manual_seed(0)
    host = Host(tiny.models()["llama"]())
    host.add(method)
    assert host.matched["default"] == {"q": 3, "o": 3, "down": 3}
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.1 * torch.rand_like(p))
    for site, delta in host.deltas():
        if isinstance(delta, MagnitudeDelta) and not isinstance(delta, DoRADelta):
            W = delta.merged(site.weight, None)[0]
            cosine = torch.cosine_similarity(W, site.weight)
            torch.testing.assert_close(cosine, torch.ones(site.d_out))
    before = outputs(host.model)
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    again = Host(tiny.models()["llama"]())
    adapter.load(again, tmp_path)
    torch.testing.assert_close(outputs(again.model), before)
    host.merge()
    torch.testing.assert_close(outputs(host.model), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
def test_the_factors_may_start_as_loras_do(init: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    host = Host(tiny.models()["llama"]())
    host.add(DoRA(r=2, alpha=3.0, dropout=0.0, init=init))
    base = outputs(tiny.models()["llama"]())
    torch.testing.assert_close(outputs(host.model), base, atol=1e-5, rtol=1e-5)
    for site, delta in host.deltas():
        assert bool(delta.lora.B.any()) == (init != "gaussian")
        torch.testing.assert_close(delta.m, site.weight.norm(dim=1))
        with torch.no_grad():
            for p in delta.parameters():
                p.add_(0.1 * torch.randn_like(p))
        V = site.weight + delta.lora.delta(site.weight)
        W = delta.merged(site.weight, None)[0]
        torch.testing.assert_close(W, delta.m[:, None] * V / V.norm(dim=1, keepdim=True))
    ours = outputs(host.model)
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    theirs = peft.PeftModel.from_pretrained(tiny.models()["llama"](), tmp_path)
    torch.testing.assert_close(outputs(theirs), ours, atol=1e-5, rtol=1e-5)
    host.merge()
    torch.testing.assert_close(outputs(host.model), ours, atol=1e-5, rtol=1e-5)


def test_a_module_cannot_be_of_both_kinds() -> None:
    with pytest.raises(ConfigError, match=r"both mean model\.layers\.0\.self_attn\.q_proj"):
        Host(tiny.models()["llama"]()).add(DoRA(magnitude_only_modules=("q",)))


def test_magnitudes_do_not_decay() -> None:
    host = Host(tiny.models()["llama"]())
    host.add(DoRA(r=2))
    groups = host.adapters["default"].param_groups(host, 1e-3, 0.1)
    still = {p for g in groups if g["weight_decay"] == 0 for p in g["params"]}
    assert still == {d.m for _, d in host.deltas()}


# -- peft ------------------------------------------------------------------------------------------
def outputs(model: nn.Module, name: str = "llama") -> Tensor:
    with torch.no_grad():
        return model.eval()(**tiny.batch(name)).logits


CROSSING = {
    "llama": ("q", "down", "embed"),
    "gpt2": ("q", "v", "down"),
    "vit": (r".*patch_embeddings\.projection", "q"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's advice on its own options
@pytest.mark.parametrize("model", CROSSING)
def test_our_adapter_computes_the_same_in_stock_peft_and_loads_again(
    model: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    host = Host(tiny.models()[model]())
    host.add(DoRA(r=2, alpha=3.0, target_modules=CROSSING[model], rank_pattern={"down": 3}))
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.05 * torch.randn_like(p))
    task: Any = "image_classification" if model == "vit" else "causal_lm"
    adapter.save(host, "default", tmp_path, task, "base")
    theirs = peft.PeftModel.from_pretrained(tiny.models()[model](), tmp_path)
    ours = outputs(host.model, model)
    torch.testing.assert_close(outputs(theirs, model), ours, atol=5e-6, rtol=1e-5)
    again = Host(tiny.models()[model]())
    adapter.load(again, tmp_path)
    assert type(again.adapters["default"]) is DoRA
    torch.testing.assert_close(outputs(again.model, model), ours, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_stock_pefts_adapter_loads_here_under_both_its_names(suffix: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=["q_proj", "up_proj"])
    theirs = peft.get_peft_model(tiny.models()["llama"](), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / adapter.WEIGHTS)
    bare = {k.removesuffix(".weight") if "magnitude" in k else k: t for k, t in tensors.items()}
    named = {k + suffix if k.endswith("vector") else k: t for k, t in bare.items()}
    save_file(named, tmp_path / adapter.WEIGHTS)
    host = Host(tiny.models()["llama"]())
    adapter.load(host, tmp_path)
    assert type(host.adapters["default"]) is DoRA
    torch.testing.assert_close(outputs(host.model), outputs(theirs), atol=5e-6, rtol=1e-5)
