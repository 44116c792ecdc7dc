"""What HUT's forms promise: worked numbers, closed gradients, zeros that stay, peft's HiRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import RobertaConfig

from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.export import adapter
from peftcli.methods.hut import HUT, HUTDelta
from peftcli.models.load import empty_model
from tests import tiny
from tests.export.test_hf_peft import TASKS, outputs
from tests.methods.test_loha import site_of

FORMS = ("mul", "mul_pure", "affine", "two_masks")


@torch.no_grad()
def moved(delta: HUTDelta, std: float = 1.0) -> HUTDelta:
    torch.manual_seed(3)
    for p in delta.parameters():
        p.normal_(std=std)
    return delta.eval()


def frozen(module: nn.Module) -> Bare:
    return Bare(module.requires_grad_(False), type(module))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_starts_at_the_very_base(form: str) -> None:
    linear = nn.Linear(6, 4)
    delta = HUT(r=3, form=form).build(site_of(linear))
    W, _ = delta.merged(linear.weight, None)
    assert torch.equal(W, linear.weight)
    x = torch.randn(5, 6)
    assert torch.equal(delta(x, frozen(linear)), linear(x))


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("mul", [[1.1, 1.8], [3.6, 3.2]]),
        ("mul_pure", [[0.1, -0.2], [0.6, -0.8]]),
        ("affine", [[2.1, 3.8], [4.6, 5.2]]),
        ("two_masks", [[1.1, 1.8], [3.6, 3.2]]),
    ],
)
def test_the_worked_example(form: str, wanted: list[list[float]]) -> None:
    delta = HUT(r=1, form=form).build(site_of(nn.Linear(2, 2)))
    with torch.no_grad():
        delta.M_B.copy_(torch.tensor([[0.1], [0.2]]))
        delta.M_A.copy_(torch.tensor([[1.0, -1.0]]))
        if form == "affine":
            delta.M_D.fill_(1.0)
            delta.M_C.copy_(torch.tensor([[1.0, 2.0]]))
    W, _ = delta.merged(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), None)
    torch.testing.assert_close(W, torch.tensor(wanted))


def test_the_scale_is_one_without_an_alpha() -> None:
    site = site_of(nn.Linear(4, 4))
    assert HUT(r=8).build(site).scale == 1.0
    assert HUT(r=8, alpha=2.0).build(site).scale == 0.25


def dense(delta: HUTDelta, W: Tensor, s: float) -> Tensor:
    """W' as the docstring of the method writes it."""
    M = delta.M_B @ delta.M_A
    return {
        "mul": W * (1 + s * M),
        "two_masks": W * (1 + s * torch.outer(delta.M_B[:, 0], delta.M_A[0])),
        "mul_pure": W * M,
        "affine": W * (1 + s * M)
        + s * (delta.M_D @ delta.M_C if delta.form == "affine" else torch.zeros_like(W)),
    }[delta.form]


@pytest.mark.parametrize("form", FORMS)
def test_forward_merged_weight_and_gradients_are_those_of_the_dense_form(form: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 5).double()
    delta = moved(HUT(r=2, alpha=3.0, form=form).build(site_of(linear))).double()
    s = 3.0 if form == "two_masks" else 1.5  # of rank 1
    x, layer = torch.randn(4, 7).double().requires_grad_(), frozen(linear)
    W, y = dense(delta, linear.weight, s), delta(x, layer)
    torch.testing.assert_close(delta.merged(linear.weight, None)[0], W)
    torch.testing.assert_close(y, x @ W.T + linear.bias)
    dy, inputs = torch.randn_like(y), [x, *delta.parameters()]
    wanted = torch.autograd.grad(x @ W.T + linear.bias, inputs, dy)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, dy), wanted)
    if form == "mul":
        GW = dy.T @ x * linear.weight
        torch.testing.assert_close(wanted[1:], (s * delta.M_B.T @ GW, s * GW @ delta.M_A.T))


def test_two_masks_are_mul_of_rank_one_whatever_r_is() -> None:
    site = site_of(nn.Linear(7, 5))
    masks, mul = (moved(method.build(site)) for method in (HUT(r=8, form="two_masks"), HUT(r=1)))
    assert (masks.M_B.shape, masks.M_A.shape) == ((5, 1), (1, 7))
    W = torch.randn(5, 7)
    assert torch.equal(masks.delta(W), mul.delta(W))


def test_zeros_of_the_weight_stay_zero_through_training() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(16, 16)
    with torch.no_grad():
        linear.weight *= torch.rand(16, 16) > 0.5
    delta, layer = HUT(r=4).build(site_of(linear)), frozen(linear)
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1)
    for _ in range(5):
        delta(torch.randn(8, 16), layer).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    W, _ = delta.merged(linear.weight, None)
    assert (W - linear.weight).abs().max() > 0.05
    assert not W[linear.weight == 0].any()


def test_rank_one_scales_the_rows_and_columns_of_the_weight() -> None:
    linear = nn.Linear(6, 4)
    delta = moved(HUT(r=1).build(site_of(linear)))
    u, v = torch.diag(delta.M_B[:, 0]), torch.diag(delta.M_A[0])
    torch.testing.assert_close(delta.delta(linear.weight), u @ linear.weight @ v)


@pytest.mark.parametrize(
    ("form", "count"), [("mul", 786_432), ("affine", 1_572_864), ("two_masks", 98_304)]
)
def test_counts_of_roberta_large(form: str, count: int) -> None:
    config = RobertaConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    host = Host(empty_model(config, "classification"))
    host.add(HUT(r=8, form=form))
    assert host.num_parameters()[0] == count


def test_the_merged_weight_of_a_bfloat16_base_is_made_in_float32() -> None:
    delta = HUT(r=1).build(site_of(nn.Linear(8, 8)))
    with torch.no_grad():
        delta.M_A.fill_(1.0)
        delta.M_B.fill_(1e-3)  # below what bfloat16 resolves beside 1
    W, _ = delta.merged(torch.ones(8, 8, dtype=torch.bfloat16), None)
    torch.testing.assert_close(W, torch.full((8, 8), 1.001))


@pytest.mark.parametrize("form", FORMS)
def test_weight_dropout_drops_entries_of_the_change_while_training(form: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 32)
    layer, x = frozen(linear), torch.eye(32)
    delta = moved(HUT(r=2, form=form, weight_dropout=0.5).build(site_of(linear)))
    if form == "affine":
        nn.init.zeros_(delta.M_D)
    whole = (delta(x, layer) - linear(x)).T
    part = (delta.train()(x, layer) - linear(x)).T
    kept = part.abs() > 1e-6
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(part[kept], 2 * whole[kept], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "targets"),
    [("llama", "all-linear"), ("gpt2", ("c_attn", "c_proj")), ("t5", ("q", "v"))],
)
@pytest.mark.parametrize(("form", "alpha"), [("mul", None), ("mul", 3.0), ("two_masks", 3.0)])
def test_stock_peft_computes_the_same_as_hira_and_our_file_loads_again(
    model: str, targets: str | tuple[str, ...], form: Any, alpha: float | None, tmp_path: Path
) -> None:
    host = Host(tiny.models()[model]())
    host.add(HUT(r=2, alpha=alpha, form=form, target_modules=targets))
    for _, delta in host.deltas():
        moved(delta, 0.3)
    adapter.save(host, "default", tmp_path, TASKS[model], "base")
    ours = outputs(host.model, model)
    theirs = peft.PeftModel.from_pretrained(tiny.models()[model](), tmp_path)
    torch.testing.assert_close(outputs(theirs, model), ours, atol=1e-5, rtol=1e-5)
    again = Host(tiny.models()[model]())
    adapter.load(again, tmp_path)
    torch.testing.assert_close(outputs(again.model, model), ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "names"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"])]
)
def test_a_hira_adapter_from_stock_peft_loads_here(
    model: str, names: list[str], tmp_path: Path
) -> None:
    config = peft.HiraConfig(
        r=3, target_modules=names, init_weights=False, fan_in_fan_out=model == "gpt2"
    )
    theirs = peft.get_peft_model(tiny.models()[model](), config)
    theirs.save_pretrained(tmp_path)
    host = Host(tiny.models()[model]())
    adapter.load(host, tmp_path)
    torch.testing.assert_close(
        outputs(host.model, model), outputs(theirs, model), atol=1e-5, rtol=1e-5
    )


def test_gradients_and_the_merged_weight_are_those_of_stock_hira(tmp_path: Path) -> None:
    host = Host(tiny.models()["llama"]())
    host.add(HUT(r=2, alpha=3.0, target_modules=("q",)))
    for _, delta in host.deltas():
        moved(delta, 0.3)
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    theirs = peft.PeftModel.from_pretrained(
        tiny.models()["llama"](), tmp_path, is_trainable=True
    ).eval()
    for model in (host.model, theirs):
        model(**tiny.batch("llama")).loss.backward()
    stock = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    for site, delta in host.deltas():
        name = f"base_model.model.{site.path}.hira_"
        dA, dB = stock[f"{name}A.default"].grad, stock[f"{name}B.default"].grad
        torch.testing.assert_close(delta.M_A.grad, dA, atol=1e-7, rtol=1e-4)
        torch.testing.assert_close(delta.M_B.grad / 1.5, dB, atol=1e-7, rtol=1e-4)
    host.merge()
    merged = dict(theirs.merge_and_unload().named_parameters())
    for site in host.sites["default"]:
        torch.testing.assert_close(site.module.weight, merged[f"{site.path}.weight"])
