"""What LoKr promises: factorisations, shapes, the product without its matrix, peft's format."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.export import adapter
from peftcli.methods.lokr import LoKr, LoKrDelta, factors
from tests import tiny
from tests.export.test_hf_peft import TASKS, outputs
from tests.methods.test_loha import site_of

SIDES = {
    768: (24, 32),
    1024: (32, 32),
    2048: (32, 64),
    3072: (48, 64),
    4096: (64, 64),
    5120: (64, 80),
    11008: (86, 128),
    14336: (112, 128),
    127: (1, 127),
}


@torch.no_grad()
def moved(delta: LoKrDelta, std: float = 1.0) -> LoKrDelta:
    torch.manual_seed(3)
    for p in delta.parameters():
        p.normal_(std=std)
    return delta.eval()


@pytest.mark.parametrize("d", SIDES)
def test_a_side_is_split_nearest_to_a_square(d: int) -> None:
    assert factors(d) == SIDES[d]


def test_a_factor_that_divides_comes_first_and_another_is_a_bound() -> None:
    assert factors(4096, 8) == (8, 512)
    assert factors(8, 4) == (4, 2)
    assert factors(24, 4) == (4, 6)
    assert factors(768, 20) == (16, 48)


@pytest.mark.parametrize("factor", [-1, 4, 5, 8, 16, 100])
@pytest.mark.parametrize("d", [*SIDES, 36, 24])
def test_splits_are_those_of_stock_peft(d: int, factor: int) -> None:
    assert factors(d, factor) == peft.tuners.lokr.layer.factorization(d, factor)


def test_the_worked_example() -> None:
    delta = LoKr(r=8, alpha=8.0).build(site_of(nn.Linear(4, 2)))
    assert (delta.W1.shape, delta.W2.shape) == ((1, 2), (2, 2))
    with torch.no_grad():
        delta.W1.copy_(torch.tensor([[1.0, 2.0]]))
        delta.W2.copy_(torch.diag(torch.tensor([1.0, 3.0])))
    wanted = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 6.0]])
    assert torch.equal(delta.delta(torch.zeros(2, 4)), wanted)


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({}, {"W1": (6, 4), "W2a": (6, 2), "W2b": (2, 6)}),
        ({"decompose_factor": 4}, {"W1": (4, 4), "W2a": (9, 2), "W2b": (2, 6)}),
        (
            {"decompose_both": True},
            {"W1a": (6, 2), "W1b": (2, 4), "W2a": (6, 2), "W2b": (2, 6)},
        ),
        ({"r": 3}, {"W1": (6, 4), "W2": (6, 6)}),
    ],
)
def test_shapes_of_the_factors(
    changes: dict[str, object], shapes: dict[str, tuple[int, int]]
) -> None:
    delta = LoKr(**{"r": 2, **changes}).build(site_of(nn.Linear(24, 36)))
    assert {n: tuple(p.shape) for n, p in delta.named_parameters()} == shapes


def test_a_square_of_4096_trains_5120_parameters_at_rank_8() -> None:
    delta = LoKr(r=8).build(site_of(nn.Linear(4096, 4096, device="meta")))
    assert sum(p.numel() for p in delta.parameters()) == 5120


@pytest.mark.parametrize(("init", "zero"), [("default", "W1a"), ("lycoris", "W2b")])
def test_all_factors_but_one_start_uniform_by_the_length_of_their_rows(
    init: str, zero: str
) -> None:
    torch.manual_seed(0)
    method = LoKr(r=9, decompose_both=True, init=init)  # pyright: ignore[reportArgumentType]
    delta = method.build(site_of(nn.Linear(4096, 4096)))
    for name, factor in delta.named_parameters():
        bound = 0.0 if name == zero else factor.shape[1] ** -0.5
        assert 0.95 * bound <= factor.abs().max() <= bound


def test_the_scale_is_alpha_over_r_even_with_whole_factors() -> None:
    delta = LoKr(r=8, alpha=4.0).build(site_of(nn.Linear(4, 4)))
    assert hasattr(delta, "W2")
    assert delta.scale == 0.5


MODULES = {
    "linear": nn.Linear(24, 36),
    "prime": nn.Linear(13, 36),
    "embedding": nn.Embedding(24, 36),
    "2d": nn.Conv2d(12, 18, 3, stride=2, padding=1),
    "circular": nn.Conv2d(12, 18, 3, padding=1, padding_mode="circular"),
    "1d": nn.Conv1d(12, 18, 5, padding=2),
    "pointwise": nn.Conv2d(12, 18, 1),
    "grouped": nn.Conv2d(12, 18, (3, 1), groups=2),
}
VARIANTS = {
    "low-rank": LoKr(r=1),
    "whole": LoKr(r=8),
    "both": LoKr(r=1, decompose_both=True),
    "core": LoKr(r=1, use_effective_conv2d=True),
    "factor": LoKr(r=2, decompose_factor=3),
}


@pytest.mark.parametrize("init", ["default", "lycoris"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", MODULES)
def test_the_product_equals_that_of_the_dense_kronecker_product(
    kind: str, variant: str, init: str
) -> None:
    module, made = MODULES[kind], VARIANTS[variant]
    delta = LoKr(**{**vars(made), "init": init}).build(site_of(module))
    layer = Bare(module, type(module))
    assert not delta.delta(weights.dense(module)).any()
    moved(delta).double()
    x = torch.randn(2, 12, *[9] * len(getattr(module, "kernel_size", ())), dtype=torch.float64)
    if kind in ("linear", "prime"):
        x = torch.randn(2, 3, module.in_features, dtype=torch.float64)
    elif kind == "embedding":
        x = torch.randint(0, 24, (2, 3))
    module.double()
    W, b = delta.merged(layer.weight, layer.bias)
    assert (W - layer.weight).abs().max() > 0.1
    torch.testing.assert_close(delta(x, layer), layer.linear(x, W, b))
    module.float()


def test_the_change_is_the_kronecker_product_of_the_factors() -> None:
    delta = moved(LoKr(r=2, alpha=3.0).build(site_of(nn.Linear(24, 36))))
    dW = delta.delta(torch.zeros(36, 24))
    torch.testing.assert_close(dW, 1.5 * torch.kron(delta.W1, delta.W2a @ delta.W2b))


@pytest.mark.parametrize("rescales", [False, True])
def test_rank_dropout_drops_rows_and_may_make_up_for_them(rescales: bool) -> None:
    linear = nn.Linear(32, 64)
    layer = Bare(linear, nn.Linear)
    method = LoKr(r=2, rank_dropout=0.5, rank_dropout_scale=rescales)
    delta, x = moved(method.build(site_of(linear))), torch.eye(32)
    whole = (delta(x, layer) - linear(x)).T
    part = (delta.train()(x, layer) - linear(x)).T
    kept = part.abs().sum(1) > 1e-3
    assert 16 < kept.sum() < 48
    factor = 64 / kept.sum() if rescales else 1.0
    torch.testing.assert_close(part[kept], whole[kept] * factor, atol=1e-4, rtol=1e-4)


def test_module_dropout_drops_all_or_nothing() -> None:
    conv = nn.Conv2d(4, 6, 3)
    layer, x = Bare(conv, nn.Conv2d), torch.randn(2, 4, 5, 5)
    delta = moved(LoKr(r=2, module_dropout=0.5).build(site_of(conv))).train()
    skipped = [torch.equal(delta(x, layer), conv(x)) for _ in range(20)]
    assert 0 < sum(skipped) < 20


PATTERNS = {"rank_pattern": {"q": 4}, "alpha_pattern": {"down": 3.0}}
PATCHES = {"target_modules": (r".*patch_embeddings\.projection",)}
CROSSING = [
    ("llama", LoKr(r=2, target_modules="all-linear", **PATTERNS)),
    ("bert", LoKr(r=1, target_modules="all-linear", decompose_both=True)),
    ("vit", LoKr(r=1, use_effective_conv2d=True, **PATCHES)),
    ("vit", LoKr(r=8, **PATCHES)),
    ("vit", LoKr(r=2, decompose_factor=4, **PATCHES)),
]


@pytest.mark.parametrize(("model", "method"), CROSSING)
def test_stock_peft_computes_the_same_and_our_file_loads_again(
    model: str, method: LoKr, tmp_path: Path
) -> None:
    head = ["classifier"] if model == "bert" else []
    host = Host(tiny.models()[model](), head)
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


@pytest.mark.parametrize("options", [{}, {"decompose_both": True}, {"decompose_factor": 4}])
@pytest.mark.parametrize(("model", "target"), [("llama", "v_proj"), ("vit", "projection")])
def test_an_adapter_from_stock_peft_loads_here(
    model: str, target: str, options: dict[str, object], tmp_path: Path
) -> None:
    config = peft.LoKrConfig(r=1, alpha=3, target_modules=[target], init_weights=False, **options)
    theirs = peft.get_peft_model(tiny.models()[model](), config)
    theirs.save_pretrained(tmp_path)
    host = Host(tiny.models()[model]())
    adapter.load(host, tmp_path)
    torch.testing.assert_close(
        outputs(host.model, model), outputs(theirs, model), atol=1e-5, rtol=1e-5
    )
