"""What LoRA's papers promise: worked numbers, scales, counts, starts and groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.methods.lora import LoRA, LoRADelta
from tests import tiny


def site_of(module: nn.Module, **known: object) -> Site:
    d_out, d_in = weights.shape(module)
    groups = getattr(module, "groups", 1)
    return Site("m", module, weights.kind_of(module), d_in, d_out, groups=groups, **known)


def grafted_layer(module: nn.Module, delta: LoRADelta) -> tuple[Bare, LoRADelta]:
    for p in module.parameters():
        p.requires_grad_(False)
    with torch.no_grad():
        delta.B.normal_()
        delta.A.normal_()
    return Bare(module, type(module)), delta.eval()


def test_pissa_of_a_diagonal_matrix_is_the_worked_example() -> None:
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.diag(torch.tensor([3.0, 1.0]))
    site = site_of(linear)
    delta = LoRA(r=1, alpha=2.0, init="pissa").build(site)
    torch.testing.assert_close(delta.A.abs(), torch.tensor([[math.sqrt(1.5), 0.0]]))
    torch.testing.assert_close(delta.B.abs(), torch.tensor([[math.sqrt(1.5)], [0.0]]))
    residual = linear.weight - delta.scale * delta.B0 @ delta.A0
    torch.testing.assert_close(residual, torch.diag(torch.tensor([0.0, 1.0])))


def test_randomised_pissa_is_close_to_the_exact_one() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 40)
    exact, fast = (LoRA(r=4, init=i).build(site_of(linear)) for i in ("pissa", "pissa_niter_16"))
    torch.testing.assert_close(fast.B @ fast.A, exact.B @ exact.A, atol=2e-2, rtol=0)


def test_olora_starts_at_the_leading_part_of_a_qr_decomposition() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 8)
    delta = LoRA(r=3, init="olora").build(site_of(linear))
    torch.testing.assert_close(delta.B.T @ delta.B, torch.eye(3), atol=1e-5, rtol=0)
    Q, R = torch.linalg.qr(linear.weight)
    torch.testing.assert_close(delta.B @ delta.A, Q[:, :3] @ R[:3], atol=1e-5, rtol=1e-5)


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    site = site_of(nn.Linear(4, 4))
    assert LoRA(r=64, alpha=16.0, use_rslora=True).scale(site) == 2.0
    assert LoRA(r=64, alpha=16.0).scale(site) == 0.25


def test_the_default_start_is_uniform_within_the_root_of_the_width() -> None:
    delta = LoRA(r=64).build(site_of(nn.Linear(256, 32)))
    assert delta.A.abs().max() <= 1 / 16
    assert delta.A.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.03)
    assert not delta.B.any()


def test_the_gaussian_start_has_deviation_one_over_the_rank() -> None:
    delta = LoRA(r=16, init="gaussian").build(site_of(nn.Linear(1024, 8)))
    assert delta.A.std().item() == pytest.approx(1 / 16, rel=0.03)


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5", "vit"])
def test_parameters_are_r_times_the_sides_of_every_site(model: str) -> None:
    host = Host(tiny.models()[model]())
    host.add(LoRA(r=3, target_modules="all-linear"))
    assert host.num_parameters()[0] == sum(3 * (s.d_in + s.d_out) for s in host.sites["default"])


def test_fused_roles_of_gpt2_cost_only_their_rows() -> None:
    host = Host(tiny.models()["gpt2"]())
    host.add(LoRA(r=4, target_modules=("q", "v")))
    d, layers = 32, host.model.config.n_layer
    assert host.num_parameters()[0] == layers * 2 * 4 * (d + d)


def test_patterns_set_single_ranks_and_alphas() -> None:
    host = Host(tiny.models()["llama"]())
    host.add(
        LoRA(
            r=2,
            alpha=4.0,
            rank_pattern={"q": 4, r"layers\.0\.self_attn\.v_proj": 1},
            alpha_pattern={"v": 8.0},
        )
    )
    by_name = {s.path: d for s, d in host.deltas()}
    first = "model.layers.0.self_attn."
    assert (by_name[first + "q_proj"].A.shape[0], by_name[first + "q_proj"].scale) == (4, 1.0)
    assert (by_name[first + "v_proj"].A.shape[0], by_name[first + "v_proj"].scale) == (1, 8.0)
    assert by_name["model.layers.1.self_attn.v_proj"].scale == 4.0


def test_lora_plus_gives_exactly_the_b_matrices_the_faster_rate() -> None:
    host = Host(tiny.models()["llama"](), new_modules=())
    host.add(LoRA(r=2, lr_ratio=16.0, target_modules=("q", "embed")))
    groups = host.adapters["default"].param_groups(host, 1e-3, 0.1)
    fast = {p for g in groups if g["lr"] == pytest.approx(1.6e-2) for p in g["params"]}
    assert fast == {d.B for s, d in host.deltas() if s.kind == "linear"}
    slow = {p for g in groups if g["lr"] == pytest.approx(1e-6) for p in g["params"]}
    assert slow == {p for s, d in host.deltas() if s.kind == "embedding" for p in (d.A, d.B)}
    assert {p for g in groups for p in g["params"]} == set(host.trained().values())


def test_lora_plus_trains_vectors_fast_without_decay_and_whole_matrices_slowly() -> None:
    host = Host(tiny.gpt2())
    host.add(LoRA(r=2, lr_ratio=4.0, embedding_lr=0.5, bias="lora_only", modules_to_save=("wpe",)))
    groups = host.adapters["default"].param_groups(host, 1e-3, 0.1)
    by_rate = {(g["lr"], g["weight_decay"]): set(g["params"]) for g in groups}
    pairs = [d for _, d in host.deltas()]
    biases = {host.model.get_parameter(n) for n in host.selected if n.endswith("bias")}
    assert by_rate == {
        (1e-3, 0.1): {d.A for d in pairs} | {host.model.transformer.wpe.weight},
        (4e-3, 0.1): {d.B for d in pairs},
        (4e-3, 0.0): biases,
    }
    assert biases


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, (3, 1), dilation=2),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv1d(4, 6, 5, padding=2),
    ],
    ids=["strided", "dilated", "grouped", "circular", "1d"],
)
def test_convolutions_fold(module: nn.Module) -> None:
    torch.manual_seed(0)
    layer, delta = grafted_layer(module, LoRADelta(site_of(module), 4, 0.5))
    x = torch.randn(2, 4, *[9] * len(module.kernel_size))
    y = delta(x, layer)
    W, b = delta.merged(layer.weight, layer.bias)
    torch.testing.assert_close(layer.linear(x, W, b), y, atol=1e-5, rtol=1e-5)


def test_an_embedding_folds_and_starts_at_zero() -> None:
    table = nn.Embedding(11, 6)
    start = LoRA(r=2).build(site_of(table))
    assert not start.A.any()
    assert start.B.any()
    layer, delta = grafted_layer(table, start)
    ids = torch.tensor([[1, 4], [10, 0]])
    W, _ = delta.merged(layer.weight, None)
    torch.testing.assert_close(F.embedding(ids, W.T), delta(ids, layer))


def test_one_of_two_tied_weights_does_not_merge_alone() -> None:
    host = Host(tiny.llama())
    host.add(LoRA(r=2, target_modules=("embed",)))
    with pytest.raises(ConfigError, match=r"embed_tokens shares its weight with lm_head"):
        host.merge()
    assert host.active == ("default",)


def test_every_table_that_t5_looks_up_is_a_site_and_no_other() -> None:
    host = Host(tiny.models()["t5"]())
    host.add(LoRA(r=2, target_modules=("embed",)))
    assert [s.path for s in host.sites["default"]] == [
        "encoder.embed_tokens",
        "decoder.embed_tokens",
    ]


def test_dropout_acts_on_the_branch_while_training_alone() -> None:
    linear = nn.Linear(64, 64)
    layer, delta = grafted_layer(linear, LoRADelta(site_of(linear), 4, 1.0, dropout=0.5))
    x = torch.randn(3, 64)
    assert torch.equal(delta(x, layer), delta(x, layer))
    delta.train()
    assert not torch.equal(delta(x, layer), delta(x, layer))
    with torch.no_grad():
        delta.B.zero_()
    torch.testing.assert_close(delta(x, layer), linear(x))


def test_a_rank_above_the_sides_is_refused_for_starts_from_the_weight() -> None:
    with pytest.raises(ConfigError, match=r"r <= min\(d_in, d_out\) = 4"):
        LoRA(r=5, init="pissa").build(site_of(nn.Linear(4, 8)))


def test_a_target_that_matches_nothing_names_the_nearest() -> None:
    host = Host(tiny.models()["llama"]())
    with pytest.raises(ConfigError, match=r"'q_prj' matches no module .* Nearest: q_proj"):
        host.add(LoRA(target_modules=("v", "q_prj")))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"rank_pattern": {"k": 4}}, r"method.rank_pattern: 'k' means none .* which are q, v"),
        ({"alpha_pattern": {"q_prj": 4.0}}, r"method.alpha_pattern: 'q_prj'"),
        ({"rank_pattern": {"(": 4}}, r"'\(' is no name and no regular expression"),
    ],
)
def test_patterns_that_mean_no_target_are_refused_where_one_trains(
    fields: dict[str, Any], said: str
) -> None:
    host = Host(tiny.llama())
    with pytest.raises(ConfigError, match=said):
        host.add(LoRA(**fields), data=tiny.Look(host.model, "llama"))
    assert not host.adapters


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("all", 2 * 6 + 1), ("lora_only", 2 * 3)])
def test_biases_of_the_base_train_all_or_those_of_the_targets(bias: str, count: int) -> None:
    host = Host(tiny.gpt2())  # two blocks of four linears and two norms, and a last norm
    host.add(LoRA(target_modules=("c_attn", "c_proj"), bias=bias))  # pyright: ignore[reportArgumentType]
    assert len(host.selected) == count == host.matched["default"].get("biases", 0)
    assert all(n.endswith(".bias") for n in host.selected)
    groups = host.adapters["default"].param_groups(host, 1e-3, 0.1)
    decaying = {p for g in groups if g["weight_decay"] for p in g["params"]}
    assert decaying == {p for _, d in host.deltas() for p in d.parameters()}
