"""What OFT promises: rotations, worked numbers, counts, COFT, and both ways to peft."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.method import Step
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.export import adapter
from peftcli.methods.oft import OFT, OFTDelta, cayley_neumann, nearest_divisor
from peftcli.methods.rotation import cayley
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


def site_of(module: nn.Module) -> Site:
    d_out, d_in = weights.shape(module)
    return Site("m", module, weights.kind_of(module), d_in, d_out)


def built(module: nn.Module, method: OFT, scale: float = 0.1) -> tuple[Bare, OFTDelta]:
    delta = method.build(site_of(module)).eval()
    torch.manual_seed(1)
    nn.init.normal_(delta.q, std=scale)
    return Bare(module.requires_grad_(False), type(module)), delta


def test_the_two_by_two_block_is_the_worked_example() -> None:
    Q = torch.tensor([[0.0, 0.1], [-0.1, 0.0]])
    R = cayley_neumann(Q, 5)
    torch.testing.assert_close(R, torch.tensor([[0.9801, 0.198], [-0.198, 0.9801]]))
    assert (R @ R.T - torch.eye(2)).abs().max().item() == pytest.approx(2.0e-4, rel=0.02)
    exact = torch.tensor([[0.980198, 0.198020], [-0.198020, 0.980198]])
    torch.testing.assert_close(cayley(Q), exact, atol=1e-6, rtol=0)


def test_the_series_nears_the_exact_form_with_the_fourth_power() -> None:
    torch.manual_seed(0)
    Q = torch.randn(8, 8, dtype=torch.float64) * 0.02
    Q = Q - Q.T
    errors = [(cayley_neumann(s * Q, 5) - cayley(s * Q)).norm() for s in (1.0, 0.5)]
    assert (errors[0] / errors[1]).item() == pytest.approx(16, rel=0.05)


def test_short_series() -> None:
    torch.manual_seed(0)
    Q = torch.randn(4, 4)
    Q = Q - Q.T
    torch.testing.assert_close(cayley_neumann(Q, 2), torch.eye(4) + 2 * Q)
    torch.testing.assert_close(cayley_neumann(Q, 3), cayley_neumann(Q, 4))
    by_hand = torch.eye(4) + 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + 2 * Q @ Q @ Q @ Q
    torch.testing.assert_close(cayley_neumann(Q, 6), by_hand + Q @ Q @ Q @ Q @ Q)


def test_q_stands_above_the_diagonal_row_by_row() -> None:
    delta = OFT(block_size=3).build(site_of(nn.Linear(3, 2)))
    with torch.no_grad():
        delta.q.copy_(torch.tensor([[1.0, 2.0, 3.0]]))
    wanted = torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]])
    assert torch.equal(delta.skew()[0], wanted)


def test_the_exact_form_is_orthogonal_and_keeps_the_norms_of_neurons() -> None:
    linear = nn.Linear(24, 7)
    _, delta = built(linear, OFT(block_size=8, cayley_neumann=False), scale=1.0)
    R = delta.blocks()
    torch.testing.assert_close(R @ R.mT, torch.eye(8).expand(3, 8, 8), atol=1e-6, rtol=0)
    W, _ = delta.merged(linear.weight, None)
    torch.testing.assert_close(W.norm(dim=1), linear.weight.norm(dim=1))


@pytest.mark.parametrize("block_share", [False, True])
@pytest.mark.parametrize("cayley_neumann", [False, True])
def test_blocks_equal_the_dense_rotation(block_share: bool, cayley_neumann: bool) -> None:
    linear = nn.Linear(12, 5)
    method = OFT(block_size=4, block_share=block_share, cayley_neumann=cayley_neumann)
    layer, delta = built(linear, method)
    R = delta.blocks()
    assert len(R) == (1 if block_share else 3)
    dense = torch.block_diag(*R.expand(3, 4, 4))
    x = torch.randn(2, 6, 12)
    torch.testing.assert_close(delta(x, layer), linear(x @ dense))
    W, b = delta.merged(linear.weight, linear.bias)
    torch.testing.assert_close(W, linear.weight @ dense.T)
    assert b is linear.bias


@pytest.mark.parametrize(
    "module",
    [nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 5)],
    ids=["strided", "grouped", "1d"],
)
def test_convolutions_turn_their_patches(module: nn.Module) -> None:
    layer, delta = built(module, OFT(block_size=6 if module.kernel_size == (3, 3) else 5))
    x = torch.randn(2, 4, *[9] * len(module.kernel_size))
    W, b = delta.merged(layer.weight, layer.bias)
    torch.testing.assert_close(layer.linear(x, W, b), delta(x, layer))
    assert (delta(x, layer) - module(x)).abs().max() > 1e-2


@pytest.mark.parametrize(("d_in", "wanted"), [(768, 11_904), (1024, 15_872), (4096, 63_488)])
def test_parameters_do_not_depend_on_the_output(d_in: int, wanted: int) -> None:
    with torch.device("meta"):
        sites = [site_of(nn.Linear(d_in, d_out)) for d_out in (1, 64)]
        assert [OFT().build(site).q.numel() for site in sites] == [wanted, wanted]
        assert OFT(block_share=True).build(sites[0]).q.numel() == 32 * 31 // 2


def test_the_nearest_divisor_is_taken_with_a_warning() -> None:
    assert nearest_divisor(5, 12) == 4  # 4 and 6 are as near
    assert nearest_divisor(32, 8) == 8
    with pytest.warns(UserWarning, match=r"block_size=32 does not divide the width 48: 24 there"):
        assert OFT().block_of(48) == 24
    assert OFT(block_size=0, r=4).block_of(48) == 12


def test_size_and_number_exclude_each_other() -> None:
    for fields in ({"r": 4}, {"block_size": 0}):
        with pytest.raises(ConfigError, match="give one of them"):
            OFT(**fields)


@pytest.mark.filterwarnings("ignore:method.block_size=4 does not divide")
@pytest.mark.parametrize(("width", "block_size"), [(8, 1), (17, 4)])
def test_blocks_of_one_number_are_refused(width: int, block_size: int) -> None:
    linear = nn.Linear(width, 3)
    with pytest.raises(ConfigError, match="blocks of one number"):
        OFT(block_size=block_size).build(Site("m", linear, "linear", width, 3))


def test_an_embedding_is_refused() -> None:
    host = Host(tiny.llama())
    with pytest.raises(ConfigError, match="ids that do not turn"):
        host.add(OFT(target_modules=("embed",)))
    assert not host.adapters


def test_dropout_leaves_that_share_of_blocks_alone_while_training() -> None:
    _, delta = built(nn.Linear(40, 3), OFT(block_size=4, module_dropout=0.35))
    R = delta.blocks()
    dropped = delta.dropped(R)
    same = (dropped == torch.eye(4)).all(-1).all(-1)
    assert same.sum() == 3  # int(0.35 * 10)
    assert torch.equal(dropped[~same], R[~same])
    layer, x = Bare(nn.Linear(40, 3), nn.Linear), torch.randn(2, 40)
    assert torch.equal(delta(x, layer), delta(x, layer))
    delta.train()
    assert not torch.equal(delta(x, layer), delta(x, layer))


def test_coft_stays_in_its_ball() -> None:
    host = Host(tiny.llama())
    host.add(OFT(block_size=8, coft=True, eps=0.01))
    with torch.no_grad():
        for i, p in enumerate(host.trained().values()):
            p.copy_(torch.randn_like(p) * (1e-5 if i % 2 else 1.0))
    inside = [d.q.clone() for _, d in host.deltas()]
    host.adapters["default"].after_step(host, Step(0, 1, 0.0))
    for (_, delta), before in zip(host.deltas(), inside, strict=True):
        norms = delta.skew().flatten(1).norm(dim=1)
        radius = 0.01 / len(delta.q) ** 0.5
        assert (norms <= radius * (1 + 1e-6)).all()
        torch.testing.assert_close(F.normalize(delta.q), F.normalize(before))
        if before.abs().max() < 1e-3:
            assert torch.equal(delta.q, before)


VARIANTS = {
    "series": OFT(block_size=8),
    "exact": OFT(block_size=8, cayley_neumann=False),
    "shared": OFT(block_size=4, block_share=True, terms=3),
    "number": OFT(block_size=0, r=2, terms=7, target_modules="all-linear"),
    "coft": OFT(block_size=8, coft=True, eps=0.5, target_modules=("o",)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_go_to_stock_peft_and_come_back(variant: str, tmp_path: Path) -> None:
    method, model = VARIANTS[variant], tiny.llama
    host = Host(model())
    torch.manual_seed(3)
    host.add(method)
    with torch.no_grad():
        for p in host.trained().values():
            p.normal_(std=0.1)
    method.after_step(host, Step(0, 1, 0.0))
    batch = tiny.batch("llama")
    with torch.no_grad():
        ours = host.model(**batch).logits
    adapter.save(host, "default", tmp_path / "ours", "causal_lm", "base")
    stock = peft.PeftModel.from_pretrained(model(), tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, ours, atol=1e-5, rtol=1e-4)
    stock.save_pretrained(tmp_path / "theirs")
    again = Host(model())
    adapter.load(again, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, ours, atol=1e-5, rtol=1e-4)


def test_series_of_older_peft_are_not_read() -> None:
    with pytest.raises(ValueError, match=r"before 0\.18"):
        OFT.from_hf({"oft_block_size": 4, "use_cayley_neumann": True, "peft_version": "0.17.1"})
    assert OFT.from_hf({"oft_block_size": 4, "use_cayley_neumann": False}) == {}
    with pytest.raises(ValueError, match=r"before 0\.14"):
        OFT.from_hf({"r": 8})


def test_fused_roles_keep_our_own_format(tmp_path: Path) -> None:
    host = Host(tiny.gpt2())
    host.add(OFT(block_size=8))
    assert "whole linear layers" in (host.adapters["default"].hf_refuses(host, "default") or "")
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    assert adapter.read_config(tmp_path)["peft_type"] == "PEFTCLI_OFT"
