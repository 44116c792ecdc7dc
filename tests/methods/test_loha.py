"""What LoHa promises: worked numbers, its rank, backward pass, cores, dropout, peft's format."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.site import Site
from peftcli.export import adapter
from peftcli.methods.loha import LoHa, LoHaDelta, hadamard_product
from peftcli.methods.lora import LoRADelta
from tests import tiny
from tests.export.test_hf_peft import TASKS, outputs


def site_of(module: nn.Module) -> Site:
    d_out, d_in = weights.shape(module)
    groups = getattr(module, "groups", 1)
    return Site("m", module, weights.kind_of(module), d_in, d_out, groups=groups)


@torch.no_grad()
def moved(delta: LoHaDelta, std: float = 1.0) -> LoHaDelta:
    torch.manual_seed(3)
    for p in delta.parameters():
        p.normal_(std=std)
    return delta.eval()


def test_the_worked_example_of_rank_one() -> None:
    delta = LoHa(r=1, alpha=3.0).build(site_of(nn.Linear(3, 2)))
    with torch.no_grad():
        delta.W1a.copy_(torch.tensor([[1.0], [2.0]]))
        delta.W1b.copy_(torch.tensor([[1.0, 0.0, 1.0]]))
        delta.W2a.copy_(torch.tensor([[2.0], [1.0]]))
        delta.W2b.copy_(torch.tensor([[1.0, 1.0, 3.0]]))
    wanted = 3.0 * torch.tensor([[2.0, 0.0, 6.0], [2.0, 0.0, 6.0]])
    assert torch.equal(delta.delta(torch.zeros(2, 3)), wanted)


def test_the_change_is_a_lora_of_the_squared_rank() -> None:
    r, site = 4, site_of(nn.Linear(24, 20))
    delta = moved(LoHa(r=r, alpha=2.0).build(site)).double()
    B = torch.cat([delta.W1a[:, i : i + 1] * delta.W2a for i in range(r)], 1)
    A = torch.cat([delta.W1b[i : i + 1] * delta.W2b for i in range(r)])
    dW = delta.delta(torch.zeros(20, 24)) / delta.scale
    torch.testing.assert_close(B @ A, dW)
    assert torch.linalg.matrix_rank(dW) == r * r == 16
    lora = LoRADelta(site, 8, 1.0)  # of as many numbers
    assert sum(map(torch.numel, delta.parameters())) == sum(map(torch.numel, lora.parameters()))


def test_the_backward_pass_equals_autograd() -> None:
    torch.manual_seed(0)
    shapes = ((5, 2), (2, 7), (5, 2), (2, 7))
    factors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(hadamard_product, factors)
    G = torch.randn(5, 7, dtype=torch.float64)
    W1a, W1b, W2a, W2b = factors
    plain = torch.autograd.grad(((W1a @ W1b) * (W2a @ W2b)), factors, G)
    torch.testing.assert_close(torch.autograd.grad(hadamard_product(*factors), factors, G), plain)


def test_three_factors_start_uniform_and_the_last_at_zero() -> None:
    delta = LoHa(r=16).build(site_of(nn.Linear(256, 64)))
    for factor, bound in ((delta.W1a, 1 / 4), (delta.W2a, 1 / 4), (delta.W1b, 1 / 16)):
        assert 0.95 * bound < factor.abs().max() <= bound
    assert not delta.W2b.any()


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5", "vit"])
def test_parameters_are_twice_those_of_lora(model: str) -> None:
    host = Host(tiny.models()[model]())
    host.add(LoHa(r=3, target_modules="all-linear"))
    sides = sum(s.d_in + s.d_out for s in host.sites["default"])
    assert host.num_parameters()[0] == 2 * 3 * sides


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 1), groups=2),
        nn.Conv1d(4, 6, 5, padding=2),
        nn.Conv2d(4, 6, 1),
    ],
    ids=["2d", "grouped", "1d", "pointwise"],
)
@pytest.mark.parametrize("core", [False, True])
def test_convolutions_fold_with_and_without_cores(module: nn.Module, core: bool) -> None:
    method, site = LoHa(r=2, use_effective_conv2d=core), site_of(module)
    assert not method.build(site).delta(weights.dense(module)).any()
    delta, layer = moved(method.build(site)), Bare(module, type(module))
    sides = module.kernel_size
    if core and max(sides) > 1:
        P1, P2 = (
            torch.einsum("pqk,po,qc->ock", T, a, b).reshape(6, -1)
            for T, a, b in (
                (delta.T1, delta.W1a, delta.W1b),
                (delta.T2, delta.W2a, delta.W2b),
            )
        )
        torch.testing.assert_close(delta.delta(layer.weight), delta.scale * P1 * P2)
        assert delta.W1a.shape == (2, 6)
    else:
        assert delta.T1 is None
        assert delta.W1a.shape == (6, 2)
    x = torch.randn(2, 4, *[9] * len(sides))
    W, b = delta.merged(layer.weight, layer.bias)
    torch.testing.assert_close(layer.linear(x, W, b), delta(x, layer))


def dropped(rank: float, module: float) -> tuple[Tensor, Tensor]:
    """The change of an identity's output while training, and in evaluation."""
    linear = nn.Linear(32, 64)
    layer = Bare(linear, nn.Linear)
    delta = moved(LoHa(r=2, rank_dropout=rank, module_dropout=module).build(site_of(linear)))
    whole = (delta(torch.eye(32), layer) - linear(torch.eye(32))).T
    torch.manual_seed(0)
    part = (delta.train()(torch.eye(32), layer) - linear(torch.eye(32))).T
    return part.detach(), whole.detach()


def test_rank_dropout_drops_rows_and_keeps_the_mean() -> None:
    part, whole = dropped(0.5, 0.0)
    kept = part.abs().sum(1) > 1e-3
    assert 16 < kept.sum() < 48
    torch.testing.assert_close(part[kept], whole[kept] * 64 / kept.sum(), atol=1e-4, rtol=1e-4)
    assert part[~kept].abs().max() < 1e-4


def test_where_no_row_is_kept_the_layer_is_the_base() -> None:
    part, _ = dropped(1 - 1e-9, 0.0)
    assert part.abs().max() < 1e-6


def test_module_dropout_drops_all_or_nothing() -> None:
    linear = nn.Linear(8, 8)
    layer, x = Bare(linear, nn.Linear), torch.randn(3, 8)
    delta = moved(LoHa(r=2, module_dropout=0.5).build(site_of(linear)))
    whole = delta(x, layer)
    delta.train()
    seen = [delta(x, layer) for _ in range(20)]
    skipped = [torch.equal(y, linear(x)) for y in seen]
    assert 0 < sum(skipped) < 20
    for y, skip in zip(seen, skipped, strict=True):
        if not skip:
            torch.testing.assert_close(y, whole)


PATTERNS = LoHa(
    r=3, target_modules="all-linear", rank_pattern={"q": 2}, alpha_pattern={"down": 3.0}
)
PATCHES = LoHa(r=2, target_modules=(r".*patch_embeddings\.projection",), use_effective_conv2d=True)


@pytest.mark.parametrize(
    ("model", "method"), [("llama", PATTERNS), ("t5", PATTERNS), ("vit", PATCHES)]
)
def test_stock_peft_computes_the_same_and_our_file_loads_again(
    model: str, method: LoHa, tmp_path: Path
) -> None:
    host = Host(tiny.models()[model]())
    host.add(method)
    for _, delta in host.deltas():
        moved(delta, 0.3)
    adapter.save(host, "default", tmp_path, TASKS[model], "base")
    ours = outputs(host.model, model)
    theirs = peft.PeftModel.from_pretrained(tiny.models()[model](), tmp_path)
    torch.testing.assert_close(outputs(theirs, model), ours, atol=1e-5, rtol=1e-5)
    again = Host(tiny.models()[model]())
    adapter.load(again, tmp_path)
    torch.testing.assert_close(outputs(again.model, model), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("model", "target"), [("llama", "v_proj"), ("vit", "projection")])
def test_an_adapter_from_stock_peft_loads_here(model: str, target: str, tmp_path: Path) -> None:
    patterns = {"layers.0.self_attn.v_proj": 2} if model == "llama" else {}
    config = peft.LoHaConfig(
        r=4,
        alpha=3,
        rank_pattern=patterns,
        target_modules=[target],
        use_effective_conv2d=True,
        init_weights=False,
    )
    theirs = peft.get_peft_model(tiny.models()[model](), config)
    theirs.save_pretrained(tmp_path)
    host = Host(tiny.models()[model]())
    adapter.load(host, tmp_path)
    torch.testing.assert_close(
        outputs(host.model, model), outputs(theirs, model), atol=1e-5, rtol=1e-5
    )
