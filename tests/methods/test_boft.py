"""What BOFT promises: permutations, orthogonality, reach of the factors, counts, peft both ways."""

from __future__ import annotations

import math
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.export import adapter
from peftcli.methods.boft import BOFT, BOFTDelta, butterfly
from peftcli.methods.oft import OFT
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def site_of(module: nn.Module) -> Site:
    d_out, d_in = weights.shape(module)
    return Site("m", module, weights.kind_of(module), d_in, d_out)


def built(module: nn.Module, method: BOFT) -> tuple[Bare, BOFTDelta]:
    delta = method.build(site_of(module)).eval()
    torch.manual_seed(1)
    nn.init.normal_(delta.R)
    nn.init.normal_(delta.s, mean=1.0)
    return Bare(module.requires_grad_(False), type(module)), delta


def dense(delta: BOFTDelta) -> torch.Tensor:
    """F_{m-1} ... F_0, each with F[k, l] = D[p(k), p(l)]."""
    n, b = delta.R.shape[1:3]
    product = torch.eye(n * b, dtype=delta.R.dtype)
    for i, blocks in enumerate(delta.blocks()):
        p = butterfly(n * b, b, i)
        product = torch.block_diag(*blocks)[p][:, p] @ product
    return product


def test_permutations_are_the_worked_examples() -> None:
    assert butterfly(16, 4, 0).tolist() == list(range(16))
    first = [0, 1, 4, 5, 2, 3, 6, 7]
    assert butterfly(16, 4, 1).tolist() == first + [8 + k for k in first]
    assert butterfly(16, 4, 2).tolist() == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]


@pytest.mark.parametrize("m", [1, 2, 3])
def test_factors_equal_the_dense_rotation_which_is_orthogonal(m: int) -> None:
    linear = nn.Linear(16, 5).double()
    layer, delta = built(linear, BOFT(n_butterfly=m))
    delta = delta.double()
    Rot = dense(delta)
    torch.testing.assert_close(Rot @ Rot.T, torch.eye(16, dtype=torch.float64))
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    wanted = delta.s * (x @ Rot @ linear.weight.T) + linear.bias
    torch.testing.assert_close(delta(x, layer), wanted)
    W, b = delta.merged(linear.weight, linear.bias)
    torch.testing.assert_close(W, delta.s[:, None] * (linear.weight @ Rot.T))
    assert b is linear.bias


def test_one_factor_without_scale_is_oft_in_its_exact_form() -> None:
    linear = nn.Linear(12, 5)
    layer, delta = built(linear, BOFT())
    nn.init.ones_(delta.s)
    oft = OFT(block_size=4, cayley_neumann=False).build(site_of(linear))
    Q = (delta.R[0].mT - delta.R[0]) / 2
    with torch.no_grad():
        oft.q.copy_(Q.flatten(1)[:, oft.upper])
    x = torch.randn(3, 12)
    torch.testing.assert_close(delta(x, layer), oft(x, layer))


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_log2_of_the_blocks_plus_one_factors_reach_everything(n: int) -> None:
    linear = nn.Linear(4 * n, 1)
    enough = int(math.log2(n)) + 1
    _, full = built(linear, BOFT(n_butterfly=enough))
    _, fewer = built(linear, BOFT(n_butterfly=enough - 1))
    assert (dense(full).abs() > 1e-9).all()
    assert (dense(fewer) == 0).any()


def test_convolutions_turn_their_patches_and_scale_their_channels() -> None:
    module = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    layer, delta = built(module, BOFT(block_size=6, n_butterfly=2))
    x = torch.randn(2, 4, 9, 9)
    W, b = delta.merged(layer.weight, layer.bias)
    torch.testing.assert_close(layer.linear(x, W, b), delta(x, layer), atol=1e-5, rtol=1e-5)


def test_stored_and_free_numbers() -> None:
    with torch.device("meta"):
        delta = BOFT().build(site_of(nn.Linear(1024, 1024)))
        three = BOFT(n_butterfly=3).build(site_of(nn.Linear(1024, 512)))
    assert sum(p.numel() for p in delta.parameters()) == 5120
    assert delta.R.numel() // 4 * 3 // 2 + delta.s.numel() == 2560  # b(b-1)/2 of b^2 are free
    assert sum(p.numel() for p in three.parameters()) == 3 * 1024 * 4 + 512


def test_dropout_leaves_blocks_of_one_factor_alone() -> None:
    _, delta = built(nn.Linear(40, 3), BOFT(n_butterfly=2, dropout=0.35))
    R = delta.blocks()
    for _ in range(5):
        dropped = delta.dropped(R)
        same = (dropped == torch.eye(4)).all(-1).all(-1)
        assert sorted(same.sum(1).tolist()) == [0, 3]  # int(0.35 * 10) in one factor
        assert torch.equal(dropped[~same], R[~same])


@pytest.mark.parametrize(
    ("fields", "width"),
    [
        ({"block_size": 5}, 16),
        ({"block_size": 4, "n_butterfly": 3}, 24),
        ({"block_size": 3, "n_butterfly": 2}, 12),
        ({"block_size": 0, "block_num": 3}, 16),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, int], width: int) -> None:
    with pytest.raises(ConfigError, match=f"does not fit the width {width}"):
        BOFT(**fields).build(site_of(nn.Linear(width, 4)))


def test_size_and_number_exclude_each_other() -> None:
    for fields in ({"block_num": 4}, {"block_size": 0}):
        with pytest.raises(ConfigError, match="give one of them"):
            BOFT(**fields)
    assert BOFT(block_size=0, block_num=4).block_of(site_of(nn.Linear(32, 4))) == 8


VARIANTS = {
    "plain": BOFT(),
    "everything": BOFT(block_size=8, target_modules="all-linear"),
    "number": BOFT(block_size=0, block_num=2, dropout=0.2),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_adapters_go_to_stock_peft_and_come_back(variant: str, model: str, tmp_path: Path) -> None:
    make = tiny.models()[model]
    host = Host(make(), ["classifier"] if model == "bert" else [])
    torch.manual_seed(3)
    host.add(VARIANTS[variant])
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(torch.randn_like(p) * 0.1)
    batch = tiny.batch(model)
    with torch.no_grad():
        ours = host.model(**batch).logits
    task = {"llama": "causal_lm", "bert": "classification"}[model]
    adapter.save(host, "default", tmp_path / "ours", task, "base")
    stock = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, ours, atol=1e-5, rtol=1e-4)
    stock.save_pretrained(tmp_path / "theirs")
    again = Host(make())
    adapter.load(again, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, ours, atol=1e-5, rtol=1e-4)


def test_several_factors_keep_our_own_format_and_come_back(tmp_path: Path) -> None:
    host = Host(tiny.llama())
    host.add(BOFT(n_butterfly=3))
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(torch.randn_like(p) * 0.1)
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    assert "CUDA extension" in adapter.read_config(tmp_path)["not_peft"]
    again = Host(tiny.llama())
    adapter.load(again, tmp_path)
    batch = tiny.batch("llama")
    with torch.no_grad():
        assert torch.equal(again.model(**batch).logits, host.model(**batch).logits)
