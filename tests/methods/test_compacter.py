"""What Compacter promises: worked numbers, one shared rule, counts, a start at the base."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config

from peftcli.core.host import Host
from peftcli.errors import ConfigError
from peftcli.methods.compacter import PHM, Compacter, Rule, Weights
from peftcli.models.load import empty_model
from tests import tiny

T5 = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)


def materialised(layer: PHM) -> Tensor:
    """H (I, O) by the definition."""
    rule = cast(Rule, layer.rule[0] if isinstance(layer.rule, tuple) else layer.rule)
    w = cast(Weights, layer.weights[0] if isinstance(layer.weights, tuple) else layer.weights)
    W = w.W if w.W is not None else cast(Tensor, w.s) @ cast(Tensor, w.t)
    return torch.stack([torch.kron(a, b) for a, b in zip(rule(), W, strict=True)]).sum(0)


def test_the_worked_example() -> None:
    rule, whole = Rule(2, 1.0, False, True), Weights(2, 2, 1, None)
    factors = Weights(2, 2, 1, 1)
    with torch.no_grad():
        cast(Tensor, rule.A).copy_(torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [-1, 0]]]))
        W = torch.tensor([[[3.0], [6.0]], [[0.0], [-1.0]]])
        cast(Tensor, whole.W).copy_(W)
        cast(Tensor, factors.s).copy_(W)
        cast(Tensor, factors.t).fill_(1.0)
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for weights in (whole, factors):
        layer = PHM(2, 2, rule, weights)
        H = torch.tensor([[3.0, 0], [6, -1], [0, 3], [1, 6]])
        torch.testing.assert_close(materialised(layer), H)
        torch.testing.assert_close(layer(x), torch.tensor([19.0, 31.0]))


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 2, None])
@pytest.mark.parametrize("factorized", [False, True])
def test_the_product_is_that_of_the_materialised_matrix(
    n: int, rank: int | None, factorized: bool
) -> None:
    torch.manual_seed(0)
    layer = PHM(n, 12, Rule(n, 1.0, factorized, True), Weights(n, 24 // n, 12 // n, rank))
    x = torch.randn(3, 5, 24)
    torch.testing.assert_close(layer(x), x @ materialised(layer) + layer.b, atol=1e-5, rtol=1e-5)


def test_a_projection_down_costs_the_papers_multiplications() -> None:
    weights, A = Weights(4, 192, 6, 1), torch.randn(4, 4, 4)
    with FlopCounterMode(display=False) as counted:
        weights.mix(torch.randn(1, 4, 192), A)
    assert counted.get_total_flops() == 2 * 4 * (768 + 16 + 24) == 6_464
    with FlopCounterMode(display=False) as counted:
        torch.randn(1, 768) @ torch.randn(768, 24)
    assert counted.get_total_flops() == 36_864


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_is_a_product_of_two_thin_matrices(rank: int) -> None:
    torch.manual_seed(0)
    host = Host(tiny.bert())
    host.add(Compacter(variant="low_rank", reduction_factor=4.0, rank=rank))
    core = cast(Any, next(d for _, d in host.deltas())).core
    x = torch.randn(2, 5, 32)
    H = core.down.s[0] @ core.down.t[0]
    assert H.shape == (32, 8)
    assert int(torch.linalg.matrix_rank(H)) == rank
    torch.testing.assert_close(core.down(x), x @ H + core.down.b)
    with pytest.raises(ConfigError, match="low_rank does not have"):
        Compacter(variant="low_rank", shared_w=True)


@pytest.mark.parametrize(
    ("fields", "wanted", "percent"),
    [
        ({}, 161_728, 0.073),
        ({"variant": "compacter++"}, 104_704, 0.047),
        ({"variant": "phm", "n": 12}, 398_976, 0.179),
        ({"variant": "low_rank"}, 48 * (2 * (768 + 24) + 768 + 24) + 47_616, 0.073),
    ],
    ids=["compacter", "compacter++", "phm", "low-rank"],
)
def test_counts_of_the_paper(fields: Any, wanted: int, percent: float) -> None:
    model = empty_model(T5, "seq2seq")
    host = Host(model)
    assert host.num_parameters()[1] == 222_903_552
    host.add(Compacter(**fields))
    assert host.num_parameters()[0] == wanted
    assert round(100 * wanted / 222_903_552, 3) == percent
    assert not any("EncDecAttention" in s.path for s in host.sites["default"])


def test_the_rule_is_held_once_and_gets_the_gradients_of_all_sites() -> None:
    host = Host(tiny.t5().double())
    torch.manual_seed(0)
    host.add(Compacter(phm_init_range=0.5))
    host.model.double()
    A = cast(nn.Parameter, cast(Any, host.shared()).rule.A)
    names = [n for n in host.state() if n.endswith("rule.A")]
    assert names == ["deltas_shared.default.rule.A"]
    host.model(**tiny.batch("t5")).loss.backward()
    summed = cast(Tensor, A.grad).clone()
    rules = []
    for _, delta in host.deltas():
        core = cast(Any, delta).core
        for layer in (core.down, core.up):
            own = Rule(4, 1.0, False, True).double()
            own.A = nn.Parameter(A.detach().clone())
            layer.rule = (own,)
            rules.append(own)
    host.model.zero_grad()
    host.model(**tiny.batch("t5")).loss.backward()
    torch.testing.assert_close(torch.stack([r.A.grad for r in rules]).sum(0), summed)


def test_the_start_is_the_base_to_a_millionth() -> None:
    torch.manual_seed(0)
    rule = Rule(4, 1e-4, False, True)
    x = torch.randn(64, 768)
    down = PHM(4, 24, rule, Weights(4, 192, 6, 1))
    up = PHM(4, 768, rule, Weights(4, 6, 192, 1))
    y = up(torch.nn.functional.gelu(down(x), approximate="tanh"))
    assert 1e-9 < y.norm() / x.norm() < 1e-6


def test_starts_have_the_deviations_of_the_code() -> None:
    torch.manual_seed(0)
    A = cast(Tensor, Compacter(n=16)._rule().A)
    assert A.std().item() == pytest.approx(1e-4, rel=0.05)
    A = cast(Tensor, Compacter(n=16, variant="phm", phm_init_range=1.0)._rule().A)
    assert A.std().item() == pytest.approx(0.01, rel=0.05)
    W = cast(Tensor, Weights(2, 300, 100, None).W)
    assert W.std().item() == pytest.approx(2**0.5 * (2 / 400) ** 0.5, rel=0.02)


def test_a_bottleneck_that_n_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.n=5 does not divide the width 32"):
        Host(tiny.t5()).add(Compacter(n=5))
    with pytest.raises(ConfigError, match=r"does not divide the bottleneck 6"):
        Host(tiny.t5()).add(Compacter(n=4, reduction_factor=5.0))


@pytest.mark.parametrize(
    "fields",
    [
        {"variant": "phm"},
        {"shared_w": True},
        {"shared_w": True, "variant": "phm"},
        {"factorized_rule": True},
        {"learn_phm": False},
        {"rank": 2, "variant": "compacter++"},
        {"rank": 2, "variant": "low_rank"},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_every_variant_trains_what_it_says(fields: Any) -> None:
    torch.manual_seed(0)
    host = Host(tiny.bert())
    host.add(Compacter(**fields))
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.3 * torch.randn_like(p))
    host.model(**tiny.batch("bert")).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in host.trained().values())
    ruled = fields.get("learn_phm", True) and fields.get("variant") != "low_rank"
    assert any("rule" in n for n in host.trained()) == ruled
    assert ("deltas_shared.default.down" in " ".join(host.state())) == bool(fields.get("shared_w"))
