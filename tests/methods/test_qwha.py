"""What QWHA promises: worked numbers, budgets, a start that cancels the quantisation error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.principal import input_grams
from peftcli.core.site import Site
from peftcli.data.collate import Batch
from peftcli.errors import ConfigError, NotApplicable
from peftcli.export import adapter
from peftcli.methods.qwha import QWHA, QWHADelta, allocate
from peftcli.train.preview import Preview
from tests import tiny


def site_of(module: nn.Module) -> Site:
    d_out, d_in = weights.shape(module)
    return Site("m", module, weights.kind_of(module), d_in, d_out)


def error_and_gram(d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    dE = torch.randn(d_out, d_in, dtype=torch.float64) * torch.rand(d_out, 1, dtype=torch.float64)
    x = torch.randn(200, d_in, dtype=torch.float64) * torch.linspace(0.1, 3, d_in).double()
    return dE, x.T @ x


def weighted(dE: Tensor, G: Tensor) -> float:
    """|R dE'|^2 with R' R = G."""
    return torch.einsum("oi,ij,oj->", dE, G, dE).item()


def preview(model: nn.Module, batches: int = 2) -> Preview:
    def collate(rows: list) -> Batch:
        inputs = {k: torch.stack([r[k] for r in rows]) for k in ("input_ids", "attention_mask")}
        return Batch(inputs, torch.zeros(1), (), 1)

    torch.manual_seed(2)
    ids = torch.randint(3, 64, (2 * batches, 9))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    examples = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    return Preview(model, "causal_lm", examples, collate, 2, 0, torch.device("cpu"))


def test_the_change_is_the_worked_example() -> None:
    linear = nn.Linear(4, 2)
    delta = QWHADelta(site_of(linear), torch.tensor([1, 7], dtype=torch.int32), c=0.5)
    with torch.no_grad():
        delta.coefficients.copy_(torch.tensor([2.0, -4.0]))
    a, b = 0.1767767, 0.3535534
    wanted = torch.tensor([[a, -a, a, -a], [-b, b, b, -b]])
    torch.testing.assert_close(delta.delta(linear.weight), wanted)


def test_budgets_are_the_worked_example() -> None:
    assert allocate(torch.tensor([100.0, 1, 1, 1]), 26, 8).tolist() == [8, 6, 6, 6]


@pytest.mark.parametrize("n", [1, 7, 40, 63, 64, 100])
@pytest.mark.parametrize("importance", [[5.0, 1, 1, 0], [1e6, 1e3, 1, 1], [0.0, 0, 0, 0]])
def test_budgets_add_up_and_fit(n: int, importance: list[float]) -> None:
    counts = allocate(torch.tensor(importance), n, 16)
    assert counts.sum() == min(n, 64)
    assert counts.max() <= 16
    assert counts.min() >= 0


@pytest.mark.parametrize(("d_out", "d_in"), [(10, 16), (6, 48)])
def test_the_start_cancels_error_and_refinement_helps(d_out: int, d_in: int) -> None:
    linear, (dE, G) = nn.Linear(d_in, d_out), error_and_gram(d_out, d_in)
    delta = QWHA(n=d_out * d_in // 4, scaling=0.25).build(site_of(linear)).double()
    delta.start(dE, G, alloc_power=1.0, damp=1e-4)
    X = delta.hadamard(dE).flatten()
    assert delta.positions.unique().numel() == d_out * d_in // 4
    left = weighted(dE - delta.delta(dE), G)
    with torch.no_grad():  # the same positions with their plain coefficients
        delta.coefficients.copy_(X[delta.positions] / delta.scale)
    assert left < weighted(dE - delta.delta(dE), G)
    assert left < weighted(dE, G)


@pytest.mark.parametrize(("power", "damp"), [(1.0, 1e-4), (0.0, 1e-4), (2.5, 10.0)])
def test_positions_are_the_largest_of_each_channel(power: float, damp: float) -> None:
    linear, (dE, G) = nn.Linear(16, 10), error_and_gram(10, 16)
    delta = QWHA(n=50).build(site_of(linear)).double()
    delta.start(dE, G, alloc_power=power, damp=damp)
    X = delta.hadamard(dE)
    counts = allocate(X.norm(dim=1) ** power, 50, 16)
    assert (len(counts.unique()) == 1) == (power == 0)
    R = torch.linalg.cholesky(G + damp * G.diagonal().mean() * torch.eye(16).double()).T
    bases = delta.hadamard(R) / 16  # columns R H_j / I
    scores = bases.square().sum(0) * X.square()
    rows, columns = delta.positions // 16, delta.positions % 16
    for i in range(10):
        S = columns[rows == i]
        fitted = torch.linalg.lstsq(bases[:, S], (R @ dE[i])[:, None]).solution[:, 0]
        mine = delta.coefficients[rows == i] * delta.scale
        torch.testing.assert_close(mine, fitted, atol=1e-9, rtol=1e-7)
        assert set(columns[rows == i].tolist()) == set(scores[i].topk(int(counts[i]))[1].tolist())


def test_with_all_coefficients_the_weight_comes_back() -> None:
    linear, (dE, G) = nn.Linear(16, 10), error_and_gram(10, 16)
    delta = QWHA(n=160).build(site_of(linear)).double()
    delta.start(dE, G, alloc_power=1.0, damp=1e-4)
    torch.testing.assert_close(delta.delta(dE), dE)


def test_the_scale_is_a_knob_of_training_alone() -> None:
    linear, (dE, G) = nn.Linear(16, 10), error_and_gram(10, 16)
    deltas = [QWHA(n=40, scaling=c).build(site_of(linear)).double() for c in (0.25, 4000.0)]
    for delta in deltas:
        delta.start(dE, G, alloc_power=1.0, damp=1e-4)
    torch.testing.assert_close(deltas[0].delta(dE), deltas[1].delta(dE))
    ratio = deltas[0].coefficients / deltas[1].coefficients
    torch.testing.assert_close(ratio, torch.full_like(ratio, 16_000))


@pytest.mark.parametrize("d_in", [16, 48])
def test_few_and_many_inputs_and_the_dense_form_agree(d_in: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(d_in, 10).double().requires_grad_(False)
    delta = QWHA(n=60, scaling=20.0).build(site_of(linear)).double()
    nn.init.normal_(delta.coefficients)
    x = torch.randn(12, d_in, dtype=torch.float64, requires_grad=True)
    layer = Bare(linear, nn.Linear)
    many, few = delta(x, layer), torch.cat([delta(x_i, layer) for x_i in x.split(4)])
    W, b = delta.merged(linear.weight, linear.bias)
    outputs = (many, few, nn.functional.linear(x, W, b))
    dy = torch.randn_like(many)
    wanted = torch.autograd.grad(outputs[2], (x, delta.coefficients), dy, retain_graph=True)
    for y in outputs[:2]:
        torch.testing.assert_close(y, outputs[2])
        got = torch.autograd.grad(y, (x, delta.coefficients), dy, retain_graph=True)
        torch.testing.assert_close(got, wanted)


def test_the_budget_is_that_of_lora() -> None:
    with torch.device("meta"):
        linear = nn.Linear(4096, 4096)
    assert QWHA().budget(site_of(linear)) == 524_288
    assert QWHA(n=1000).budget(site_of(linear)) == 1000
    assert QWHA().build(site_of(nn.Linear(32, 8))).coefficients.numel() == 256


def test_the_plain_start_is_zeros_at_the_seeds_positions() -> None:
    site = site_of(nn.Linear(16, 10))
    first, again, other = (QWHA(n=30, seed=s, init="plain").build(site) for s in (777, 777, 3))
    assert not first.coefficients.any()
    assert first.positions.unique().numel() == 30
    assert first.positions.dtype == torch.int32
    assert torch.equal(first.positions, again.positions)
    assert not torch.equal(first.positions, other.positions)


def test_a_width_without_hadamard_matrix_is_refused() -> None:
    host = Host(tiny.llama())
    host.model.model.layers[1].mlp.gate_proj = nn.Linear(52, 48)
    with pytest.raises(NotApplicable, match=r"LlamaForCausalLM.*order 52 .*gate_proj"):
        host.add(QWHA())
    assert not host.adapters


def test_gram_matrices_leave_padding_out_and_are_shared() -> None:
    host = Host(tiny.llama())
    sites = [s for s in _sites(host) if s.layer == 0]
    data = preview(host.model)
    grams = input_grams(host, sites, data, 2)
    by_role = {s.role: grams[s.name] for s in sites}
    assert by_role["q"] is by_role["k"] is by_role["v"] is not by_role["o"]
    assert by_role["gate"] is by_role["up"]
    block, wanted = host.model.model.layers[0], torch.zeros(32, 32, dtype=torch.float64)
    for batch in data.batches(2):
        mask = batch.inputs["attention_mask"].bool()
        x = block.input_layernorm(host.model.model.embed_tokens(batch.inputs["input_ids"]))
        wanted += x[mask].double().T @ x[mask].double()
    torch.testing.assert_close(by_role["q"], wanted, atol=1e-5, rtol=1e-5)


def _sites(host: Host) -> list[Site]:
    host.building, host.matched[""] = "", {}
    return host.find("all-linear")


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes
def test_a_quantised_model_starts_nearer_to_the_original_one(tmp_path: Path) -> None:
    original = tiny.llama()
    original.save_pretrained(tmp_path)
    rounded = tiny.quantised(tiny.llama(), "nf4")
    rounded.name_or_path = str(tmp_path)
    batch = tiny.batch("llama")
    with torch.no_grad():
        wanted, before = original(**batch).logits, rounded(**batch).logits
        host = Host(rounded)
        host.add(QWHA(n=300, scaling=10.0), data=preview(rounded))
        after = host.model(**batch).logits
    assert (after - wanted).norm() < 0.5 * (before - wanted).norm()
    adapter.save(host, "default", tmp_path / "adapter", "causal_lm", "base")
    again = Host(tiny.quantised(tiny.llama(), "nf4"))
    adapter.load(again, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again.model(**batch).logits, after)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes
def test_without_the_weights_before_rounding_the_way_out_is_named() -> None:
    host = Host(tiny.quantised(tiny.llama(), "nf4"))
    with pytest.raises(ConfigError, match=r"method\.init=plain"):
        host.add(QWHA(), data=preview(host.model))
    assert not host.adapters
    host.add(QWHA(init="plain"), data=preview(host.model))
    assert all(not d.coefficients.any() for _, d in host.deltas())
