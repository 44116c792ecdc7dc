"""What LaMDA promises: its starts, the freezing of B, counts, LaMDA++'s ranks, files of LoRA."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.method import Step
from peftcli.errors import ConfigError
from peftcli.export import adapter
from peftcli.methods.lamda import LaMDA, by_energy, by_groups, energies
from peftcli.methods.lora import LoRA
from peftcli.models.load import empty_model
from tests import tiny
from tests.export.test_hf_peft import TASKS, outputs
from tests.methods.test_loha import site_of

INITS = ("svd_residual", "svd_zero", "random")


def adapted(method: LaMDA, model: str = "llama") -> Host:
    torch.manual_seed(5)
    host = Host(tiny.models()[model](), ["classifier"] if model == "bert" else [])
    host.add(method)
    return host


def train(host: Host, total: int, watch: list[dict[str, Tensor]] | None = None) -> None:
    """AdamW with momentum and weight decay; `watch` gets every B after each step."""
    (method,) = host.adapters.values()
    optimizer = torch.optim.AdamW(method.param_groups(host, 1e-2, 0.1))
    host.model.train()
    for index in range(total):
        t = Step(index, total, 0.0)
        method.before_step(host, t)
        host.model(**tiny.batch("llama"), use_cache=False).loss.backward()
        method.after_backward(host, t)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(host, t)
        for parameter in host.reset_requests:
            optimizer.state.pop(parameter, None)
        host.reset_requests.clear()
        if watch is not None:
            watch.append({s.path: d.B.detach().clone() for s, d in host.deltas()})
    kept = {p for p in optimizer.state}
    assert all(delta.S in kept and delta.B not in kept for _, delta in host.deltas())
    host.model.eval()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("model", TASKS)
def test_every_start_leaves_the_function_unchanged(model: str, init: str) -> None:
    base = outputs(tiny.models()[model](), model)
    host = adapted(LaMDA(r=4, target_modules="all-linear", init=init), model)
    torch.testing.assert_close(outputs(host.model, model), base, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("init", INITS)
def test_the_starts_of_the_factors(init: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(12, 10)
    U, sigma, Vh = torch.linalg.svd(linear.weight.detach())
    delta = LaMDA(r=4, alpha=2.0, init=init).build(site_of(linear))
    if init == "random":
        assert not delta.B.any()
        assert 0.9 * 12**-0.5 < delta.A.abs().max() <= 12**-0.5
        assert 0.7 * 0.5 < delta.S.abs().max() <= 0.5
        return
    torch.testing.assert_close(delta.A, Vh[:4])
    torch.testing.assert_close(delta.B, U[:, :4])
    if init == "svd_zero":
        assert not delta.S.any()
        return
    torch.testing.assert_close(delta.S, torch.diag(sigma[:4] / 0.5))
    leading = U[:, :4] * sigma[:4] @ Vh[:4]
    torch.testing.assert_close(0.5 * delta.C0 @ delta.A, leading, atol=1e-6, rtol=1e-5)


def test_a_module_has_at_most_the_rank_of_its_shorter_side() -> None:
    delta = LaMDA(r=32, alpha=16.0).build(site_of(nn.Linear(48, 16)))
    assert delta.S.shape == (16, 16)
    assert delta.scale == 1.0


@pytest.mark.parametrize(
    ("law", "wanted"),
    [
        ("linear", {9: 0, 10: 1, 100: 10, 150: 16, 299: 31, 300: 32, 999: 32}),
        ("official_code", {299: 0, 300: 1, 599: 1, 600: 2, 900: 3, 999: 3}),
    ],
)
def test_how_many_columns_rest(law: str, wanted: dict[int, int]) -> None:
    method = LaMDA(r=32, eta=0.3, freeze_law=law)
    assert {i: method.frozen(32, Step(i, 1000, 0.0)) for i in wanted} == wanted


@pytest.mark.parametrize("init", INITS)
def test_frozen_columns_and_a_keep_every_bit(init: str) -> None:
    method = LaMDA(r=4, eta=0.5, init=init)
    host, seen = adapted(method), []
    A = {site.path: delta.A.clone() for site, delta in host.deltas()}
    train(host, 20, seen)
    for site, delta in host.deltas():
        assert torch.equal(delta.A, A[site.path])
        assert not delta.A.requires_grad
        for index in range(1, 20):
            f = method.frozen(4, Step(index, 20, 0.0))
            before, after = seen[index - 1][site.path], seen[index][site.path]
            assert torch.equal(after[:, :f], before[:, :f])
            assert f == 4 or (after[:, f:] != before[:, f:]).any(0).all()
        assert delta.B.any(0).all()


@pytest.mark.parametrize("init", INITS)
def test_the_backward_pass_equals_the_dense_one_and_saves_no_input(init: str) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(7, 6).double()
    delta = LaMDA(r=3, dropout=0.0, init=init).build(site_of(linear)).double()
    with torch.no_grad():
        delta.B.normal_()
        delta.S.normal_()
    layer = Bare(linear.requires_grad_(False), nn.Linear)
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    saved: list[int] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = delta(x, layer)
    assert x.data_ptr() not in saved
    W = linear.weight + delta.scale * delta.B @ delta.S @ delta.A
    if init == "svd_residual":
        W = W - delta.scale * delta.C0 @ delta.A
    G, inputs = torch.randn_like(y), (delta.S, delta.B, x)
    dense = torch.autograd.grad(x @ W.T + linear.bias, inputs, G)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, G), dense)
    torch.testing.assert_close(delta.merged(layer.weight, layer.bias)[0], W)


def test_counts_of_llama_2_7b_at_the_ends_and_on_average() -> None:
    host = Host(empty_model(LlamaConfig(), "causal_lm"))
    method = LaMDA(r=32, eta=0.3, init="random", target_modules=("q", "k", "v", "up", "down"))
    host.add(method)
    squares = sum(d.S.numel() for _, d in host.deltas())
    columns = sum(len(d.B) for _, d in host.deltas())
    assert (squares, 32 * columns) == (163_840, 28_049_408)
    assert host.num_parameters()[0] == squares + 32 * columns
    frozen = [method.frozen(32, Step(i, 1000, 0.0)) for i in range(1000)]
    assert mean(columns * (32 - f) + squares for f in frozen) == pytest.approx(4_515_004.4, abs=0.1)
    finely = mean(method.frozen(32, Step(i, 10**5, 0.0)) for i in range(10**5))  # nearly its limit
    limit = 0.3 * 33 / 2 * columns + squares
    assert round(limit) == 4_502_733
    assert columns * (32 - finely) + squares == pytest.approx(limit, rel=1e-4)
    printed = 0.3 / 2 * 32 * columns + squares  # as if columns froze by fractions
    assert round(printed) == 4_371_251


# -- LaMDA++ ---------------------------------------------------------------------------------------
def test_a_flat_spectrum_gets_more_rank_than_one_direction() -> None:
    flat, thin = torch.eye(24), torch.outer(torch.ones(24), torch.arange(24.0))
    E = {"flat": energies(flat), "thin": energies(thin)}
    torch.testing.assert_close(E["flat"], torch.arange(1, 25) / 24)
    for ranks in (by_groups({n: float(e[7]) for n, e in E.items()}, 8), by_energy(E, 8)):
        assert ranks["flat"] > ranks["thin"]
        assert mean(ranks.values()) == 8


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 12, 15])
def test_groups_cost_the_rank_on_average(n: int) -> None:
    ranks = by_groups({str(i): i / n for i in range(n)}, 32)
    assert mean(ranks.values()) == 32
    assert list(ranks.values()) == sorted(ranks.values(), reverse=True)
    if n % 5 == 0:
        assert sorted(ranks.values()) == sorted([16, 24, 32, 40, 48] * (n // 5))


def test_spectrum_ranks_each_role_by_its_flatness() -> None:
    host = adapted(LaMDA(r=8, rank_alloc="spectrum", target_modules=("q", "down")))
    for role in ("q", "down"):
        held = [
            (float(energies(s.weight)[7]), len(d.S)) for s, d in host.deltas() if s.role == role
        ]
        assert [r for _, r in sorted(held)] == [12, 8, 4]


def test_a_common_level_of_energy_costs_the_rank_on_average_within_bounds() -> None:
    torch.manual_seed(0)
    E = {str(i): energies(torch.randn(40, 40) * torch.arange(1, 41) ** -(i / 8)) for i in range(9)}
    ranks = by_energy(E, 8)
    assert mean(ranks.values()) == pytest.approx(8, abs=0.5)
    assert set(ranks.values()) <= set(range(4, 13))
    assert list(ranks.values()) == sorted(ranks.values(), reverse=True)
    host = adapted(LaMDA(r=8, rank_alloc="energy"), "gpt2")
    assert mean(len(d.S) for _, d in host.deltas()) == pytest.approx(8, abs=1)


def test_what_cannot_be_allocated_or_adapted_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be a multiple of 8"):
        adapted(LaMDA(r=4, rank_alloc="spectrum"))
    with pytest.raises(ConfigError, match=r"not model\.embed_tokens"):
        adapted(LaMDA(r=4, target_modules=("embed",)))


# -- files and merging -----------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's advice on its own options
@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("model", TASKS)
def test_merged_and_exported_as_lora_it_computes_the_same(
    model: str, init: str, tmp_path: Path
) -> None:
    host = adapted(LaMDA(r=8, rank_alloc="spectrum", init=init), model)
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.05 * torch.randn_like(p))
    ours = outputs(host.model, model)
    adapter.save(host, "default", tmp_path, TASKS[model], "base")
    theirs = peft.PeftModel.from_pretrained(tiny.models()[model](), tmp_path)
    torch.testing.assert_close(outputs(theirs, model), ours, atol=1e-5, rtol=1e-5)
    again = Host(tiny.models()[model]())
    adapter.load(again, tmp_path)
    assert isinstance(again.adapters["default"], LoRA)
    torch.testing.assert_close(outputs(again.model, model), ours, atol=1e-5, rtol=1e-5)
    host.merge()
    torch.testing.assert_close(outputs(host.model, model), ours, atol=1e-5, rtol=1e-5)
