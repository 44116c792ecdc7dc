"""What DID and SAID promise: worked projections, budgets, seeds by name, and one plain model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from peftcli.core.host import Host
from peftcli.errors import ConfigError
from peftcli.export import adapter
from peftcli.methods.fastfood import Dense, Fastfood
from peftcli.methods.intrinsic_dimension import IntrinsicDelta, IntrinsicDimension, Subspace
from tests import tiny


def toy(D: int, d: int) -> Fastfood:
    P = Fastfood(D, d, torch.Generator())
    P.B = torch.tensor([1, -1, 1, 1], dtype=torch.int8)[:d]
    P.slots = torch.tensor([2, 0, 3, 1], dtype=torch.int32) % d
    P.G = torch.tensor([0.5, -1.0, 2.0, 1.0])
    P.norm = math.sqrt(D * 6.25)
    return P


def columns(P: torch.nn.Module, d: int) -> Tensor:
    return torch.stack([P(e) for e in torch.eye(d)], 1)


def logits(model: torch.nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return model(**tiny.batch(name)).logits


def moved(model: str, method: IntrinsicDimension, scale: float = 0.5) -> Host:
    host = Host(tiny.models()[model](), ["classifier"] if model == "bert" else [])
    host.add(method)
    torch.manual_seed(4)
    torch.nn.init.normal_(host.shared().v, std=scale)
    return host


def test_the_projection_is_the_worked_example() -> None:
    v = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(toy(4, 2)(v), torch.tensor([1.9, 0.3, -1.7, -0.9]))
    three = torch.tensor([2.193931, 0.346410, -1.962991])
    torch.testing.assert_close(toy(3, 2)(v), three, atol=1e-6, rtol=0)


def test_columns_have_norm_one_and_are_not_orthogonal() -> None:
    P = columns(toy(4, 4), 4)
    torch.testing.assert_close(P.norm(dim=0), torch.ones(4))
    assert (P[:, 0] @ P[:, 1]).item() == pytest.approx(0.6)
    full = columns(Fastfood(64, 20, torch.Generator().manual_seed(0)), 20)
    torch.testing.assert_close(full.norm(dim=0), torch.ones(20))
    most = columns(Fastfood(5000, 20, torch.Generator().manual_seed(0)), 20)
    torch.testing.assert_close(most.norm(dim=0), torch.ones(20), atol=0.05, rtol=0)


@pytest.mark.parametrize(("D", "d"), [(64, 5), (50, 64), (3, 9), (1, 2), (100, 17)])
def test_autograd_is_the_transposed_dense_projection(D: int, d: int) -> None:
    P = Fastfood(D, d, torch.Generator().manual_seed(1)).double()
    dense = torch.stack([P(e) for e in torch.eye(d, dtype=torch.float64)], 1)
    v = torch.randn(d, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(P(v), dense @ v)
    g = torch.randn(D, dtype=torch.float64)
    (grad,) = torch.autograd.grad(P(v), v, g)
    torch.testing.assert_close(grad, dense.T @ g)


def test_what_a_small_tensor_has_no_room_for_does_not_reach_it() -> None:
    P, v = Fastfood(3, 9, torch.Generator().manual_seed(1)), torch.randn(9, requires_grad=True)
    (grad,) = torch.autograd.grad(P(v).square().sum(), v)
    assert grad[:4].all()
    assert not grad[4:].any()
    assert torch.equal(P(v), P(torch.cat([v[:4], torch.randn(5)])))


def test_the_official_gradient_is_smaller_by_the_padded_length() -> None:
    shared = Subspace(5, None)
    torch.nn.init.normal_(shared.v)
    P = Fastfood(50, 5, torch.Generator().manual_seed(1))
    exact, official = (IntrinsicDelta(shared, {"w": 0}, {"w": P}, o) for o in (False, True))
    assert torch.equal(exact.update("w"), official.update("w"))
    grads = [
        torch.autograd.grad(delta.update("w").square().sum(), shared.v)[0]
        for delta in (exact, official)
    ]
    torch.testing.assert_close(grads[1], grads[0] / 64)


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5", "vit"])
def test_the_start_is_the_base_bit_for_bit(model: str) -> None:
    host = Host(tiny.models()[model]())
    host.add(IntrinsicDimension(d=40))
    assert torch.equal(logits(host.model, model), logits(tiny.models()[model](), model))


def test_every_weight_moves_by_its_projection_and_tied_ones_alike() -> None:
    method = IntrinsicDimension(d=30, said=False)
    host = moved("llama", method)
    base = dict(tiny.llama().named_parameters())
    v = host.shared().v
    seen = {}
    for site, delta in host.deltas():
        for name, tensor in delta.moved(site.module).items():
            seen[f"{site.path}.{name}"] = tensor
    assert seen.keys() - {"lm_head.weight"} == base.keys()
    assert torch.equal(seen["lm_head.weight"], seen["model.embed_tokens.weight"])
    for name, theta in base.items():
        P = method._projection(name, theta, 30)
        torch.testing.assert_close(seen[name], theta + P(v).view(theta.shape))


def test_projections_depend_on_seed_and_name_alone() -> None:
    everything = moved("bert", IntrinsicDimension(d=30, said=False))
    few = moved("bert", IntrinsicDimension(d=30, said=False, filter="attention"))
    other = moved("bert", IntrinsicDimension(d=30, said=False, seed=1))
    path = "bert.encoder.layer.1.attention.self.query"
    updates = [
        next(d for s, d in host.deltas() if s.path == path).update("weight")
        for host in (everything, few, other)
    ]
    assert torch.equal(updates[0], updates[1])
    assert not torch.equal(updates[0], updates[2])


@pytest.mark.parametrize("projection", ["fastfood", "dense"])
def test_said_with_scales_of_one_is_did(projection: str) -> None:
    said = moved("gpt2", IntrinsicDimension(d=33, projection=projection), 0.1)  # 2 blocks, the rest
    did = moved("gpt2", IntrinsicDimension(d=30, said=False, projection=projection), 0.1)
    assert torch.equal(said.shared().v, did.shared().v)
    assert torch.equal(logits(said.model, "gpt2"), logits(did.model, "gpt2"))
    with torch.no_grad():
        said.shared().scales[1] = 2.0
    assert not torch.equal(logits(said.model, "gpt2"), logits(did.model, "gpt2"))


@pytest.mark.parametrize(
    ("fields", "groups"),
    [
        ({"said": False}, None),
        ({}, 3),  # two blocks and what is outside of them
        ({"said_group": "tensor"}, len(list(tiny.gpt2().parameters()))),
    ],
)
def test_the_numbers_that_train_are_d_in_all(fields: dict, groups: int | None) -> None:
    host = Host(tiny.gpt2())
    host.add(IntrinsicDimension(d=200, **fields))
    shared = host.shared()
    assert host.num_parameters()[0] == 200
    assert (None if shared.scales is None else shared.scales.numel()) == groups
    groups_of = host.adapters["default"].param_groups(host, 1e-2, 0.1)
    assert [g["weight_decay"] for g in groups_of] == [0.0]


def test_a_number_of_v_is_given_up_for_each_scale() -> None:
    """The authors' code gives up one more, and trains a dead scale in its place."""
    method = IntrinsicDimension(d=20_000, said_group="tensor")
    assert method._numbers_of_v(282) == 19_717 + 1


def test_encoder_and_decoder_blocks_are_groups_of_their_own() -> None:
    host = Host(tiny.t5())
    host.add(IntrinsicDimension(d=100))
    assert host.shared().scales.numel() == 2 + 2 + 1


def test_too_small_a_budget_is_refused() -> None:
    host = Host(tiny.gpt2())
    with pytest.raises(ConfigError, match="more than one number for each of its 3 groups"):
        host.add(IntrinsicDimension(d=3))
    assert not host.adapters


def test_fresh_heads_train_as_they_are() -> None:
    host = moved("bert", IntrinsicDimension(d=40, modules_to_save=("pooler",)))
    paths = {s.path for s in host.sites["default"]}
    assert not any("classifier" in p or "pooler" in p for p in paths)
    assert "bert.encoder.layer.0.output.dense" in paths


@pytest.mark.parametrize("model", ["llama", "t5", "vit"])
def test_the_merged_model_is_plain_and_computes_the_same(model: str) -> None:
    host = moved(model, IntrinsicDimension(d=40))
    apart, names = logits(host.model, model), set(tiny.models()[model]().state_dict())
    host.adapters["default"].before_merge(host, "default")
    host.merge()
    assert set(host.model.state_dict()) == names
    torch.testing.assert_close(logits(host.model, model), apart, atol=1e-6, rtol=1e-6)
    if model == "llama":
        assert host.model.lm_head.weight is host.model.model.embed_tokens.weight


def test_the_file_holds_d_numbers_and_the_seed(tmp_path: Path) -> None:
    host = moved("llama", IntrinsicDimension(d=40, seed=3))
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    held = load_file(tmp_path / adapter.WEIGHTS)
    assert sum(t.numel() for t in held.values()) == 40
    assert adapter.read_config(tmp_path)["method"]["seed"] == 3
    again = Host(tiny.llama())
    adapter.load(again, tmp_path)
    assert torch.equal(logits(again.model, "llama"), logits(host.model, "llama"))


def test_an_unmatched_filter_is_refused() -> None:
    with pytest.raises(ConfigError, match="found in no parameter's name"):
        Host(tiny.llama()).add(IntrinsicDimension(filter="atention"))
    with pytest.raises(ConfigError, match=r"method.filter: '\(' is no name and no regular"):
        Host(tiny.llama()).add(IntrinsicDimension(filter="("))


def test_the_dense_projection_has_deviation_a_hundredth() -> None:
    P = Dense(400, 50, torch.Generator().manual_seed(0)).P
    assert P.std().item() == pytest.approx(0.01, rel=0.02)
