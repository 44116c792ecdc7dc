"""What SPT promises: prices, the choice of an allocation, and what trains under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.method import Step
from peftcli.core.site import Site
from peftcli.errors import ConfigError, NotApplicable
from peftcli.export import adapter
from peftcli.methods.lora import LoRADelta
from peftcli.methods.sparse import SparseDelta
from peftcli.methods.spt import SPT, PathLoRADelta, SPTAdapterDelta
from peftcli.methods.spt_allocation import allocate, nearest, rank, sensitivities
from tests import tiny
from tests.train import conftest
from tests.train.conftest import MakeLoop, interrupted

make_loop = conftest.make_loop  # the fixture
Structured = Literal["lora", "adapter"]
SMALL: dict[str, Any] = {"budget": 2000, "step": 100, "batches": 2}
MODELS = pytest.mark.parametrize("model", sorted(tiny.models()))
STRUCTURED = pytest.mark.parametrize("structured", ["lora", "adapter"])


def test_an_allocation_to_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method.allocation: vit.layer.0.q is none"):
        Host(tiny.vit()).add(SPT(allocation={"vit.layer.0.q": 3}))


def adapted(name: str, method: SPT) -> Host:
    """The model under the method, which has seen the task."""
    torch.manual_seed(0)
    host = Host(tiny.models()[name]())
    host.add(method, data=tiny.Look(host.model, name))
    return host


@torch.no_grad()
def logits(host: Host, name: str) -> Tensor:
    return host.model.eval()(**tiny.batch(name)).logits


def site(d_in: int, d_out: int, role: str | None = None) -> Site:
    return Site("m", nn.Linear(d_in, d_out), "linear", d_in, d_out, role)


def test_the_published_costs_and_triggers() -> None:
    lora, bottleneck = SPT(), SPT(structured="adapter")
    assert lora.price(site(768, 768)).whole == 12_288
    assert lora.price(site(768, 3072)).whole == lora.price(site(3072, 768)).whole == 30_720
    assert (lora.price(site(768, 768)).of(1_228), lora.price(site(768, 768)).of(1_229)) == (
        1_228,
        12_288,
    )
    assert lora.price(site(768, 3072)).of(3_072) == 30_720
    assert bottleneck.price(site(768, 768)).whole == 13_064
    assert bottleneck.price(site(768, 3072)).whole == 52_232


@pytest.mark.parametrize("role", [None, "o"])
@STRUCTURED
def test_a_structured_matrix_costs_what_it_trains(structured: Structured, role: str | None) -> None:
    method = SPT(structured=structured, r=3)
    place = site(10, 14, role)
    assert sum(p.numel() for p in method.build(place).parameters()) == method.price(place).whole


@pytest.mark.parametrize(("n", "wanted"), [(4, None), (3, 3)])
def test_a_matrix_is_structured_from_its_trigger_on(n: int, wanted: int | None) -> None:
    method = SPT(r=1, alpha=2.0)
    price = method.price(site(4, 4))
    assert (price.whole, price.trigger) == (8, 4)
    S = torch.zeros(4, 4)
    S.view(-1)[[1, 5, 8, 14][:n]] = torch.arange(1.0, n + 1)
    (found,) = allocate([S], [price], price.of(n), n)
    assert found is None if wanted is None else sorted(found.tolist()) == [1, 5, 8]


def test_a_short_vector_trains_whole_and_a_longer_one_singly() -> None:
    method = SPT()
    assert [method.vector_price(length).of(1) for length in (5, 6)] == [5, 1]
    assert SPT(structured_vector=False).vector_price(5).of(5) == 5
    assert SPT(structured_vector=False).vector_price(5).of(4) == 4


def test_the_nearest_total_is_taken() -> None:
    totals = [10, 30, 50]
    assert nearest(totals, 40) == 2  # of two as near the later
    assert nearest(totals, 12) == 0
    assert nearest([10, 45], 20) == 0  # above twice the budget is never taken
    assert nearest([30, 50], 12) is None


def test_a_budget_below_the_smallest_allocation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Lower method\.step"):
        adapted("llama", SPT(budget=10, step=1000, batches=1))


def test_weights_of_all_tensors_are_ranked_together() -> None:
    owner, position = rank([torch.tensor([[1.0, 9.0], [3.0, 0.0]]), torch.tensor([2.0, 8.0])], 4)
    assert list(zip(owner.tolist(), position.tolist(), strict=True)) == [
        (0, 1),
        (1, 1),
        (0, 2),
        (1, 0),
    ]


@MODELS
def test_sensitivities_are_sums_of_squared_gradients(model: str) -> None:
    host = Host(tiny.models()[model]())
    task = tiny.Look(host.model, model)
    host.matched[""] = {}
    sites = host.find("all-linear")
    vectors = [n for n, p in host.model.named_parameters() if p.ndim == 1]
    found = sensitivities(host, sites, vectors, task, 2)
    assert not host.trained()
    assert all(p.grad is None for p in host.model.parameters())
    named = {s.name: s for s in sites}
    host.model.requires_grad_(True)
    wanted = [torch.zeros_like(t) for t in found]
    for batch in task.batches(2):
        host.model.zero_grad()
        task.loss(batch).backward()
        tensors = [s.module.weight.grad for s in sites]
        turned = [g.T if model == "gpt2" else g.flatten(1) for g in tensors]
        for sum_, g in zip(
            wanted, turned + [host.model.get_parameter(n).grad for n in vectors], strict=True
        ):
            sum_ += g**2
    assert len(named) == len(sites)
    for ours, dense in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, dense, atol=1e-9, rtol=1e-3)


@STRUCTURED
@MODELS
def test_it_starts_at_the_base_and_trains_what_comes_nearest_its_budget(
    model: str, structured: Structured
) -> None:
    method = SPT(structured=structured, **SMALL)
    host, base = adapted(model, method), Host(tiny.models()[model]())
    torch.testing.assert_close(logits(host, model), logits(base, model), atol=3e-6, rtol=1e-5)
    deltas = [delta for _, delta in host.deltas()]
    masks: Any = host.shared()
    single = sum(int(masks[n].sum()) for n in masks.names)
    tokens = sum(p.numel() for n, p in host.trained().items() if n.endswith("cls_token"))
    total = sum(p.numel() for d in deltas for p in d.parameters()) + single + tokens
    offered = [tokens + n for n in all_totals(base, model, method)]
    distances = [abs(n - 2000) for n in offered if n <= 4000]
    assert total in offered
    assert abs(total - 2000) == min(distances)


def all_totals(host: Host, model: str, method: SPT) -> list[int]:
    """What each of the 79 numbers of most sensitive weights costs, counted tensor by tensor."""
    host.matched[""] = {}
    sites = host.find("all-linear")
    norms = [site.module for site in host.places("norm")]
    ours = {id(p) for module in [*norms, *(s.module for s in sites)] for p in module.parameters()}
    vectors = [n for n, p in host.model.named_parameters() if p.ndim == 1 and id(p) in ours]
    scores = sensitivities(host, sites, vectors, tiny.Look(host.model, model), 2)
    sizes = [s.numel() for s in scores]
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = torch.cat([s.flatten() for s in scores]).argsort(descending=True, stable=True)
    prices = [method.price(s) for s in sites] + [
        method.vector_price(n) for n in sizes[len(sites) :]
    ]
    found = []
    for i in range(1, 80):
        counts = owner[order[: i * method.step]].bincount(minlength=len(sizes)).tolist()
        found.append(
            sum(p.whole if n >= p.trigger else n for n, p in zip(counts, prices, strict=True))
        )
    return found


def test_what_trains_in_any_case_counts_towards_the_budget() -> None:
    S, price = torch.arange(1.0, 101.0), SPT().vector_price(10**6)
    assert [len(allocate([S], [price], 30, 10, n)[0]) for n in (0, 10, 25, 45)] == [30, 20, 10, 10]
    with pytest.raises(ConfigError, match="more than twice"):
        allocate([S], [price], 30, 10, 51)


def test_without_data_nobody_can_choose() -> None:
    host = Host(tiny.models()["llama"]())
    with pytest.raises(ConfigError, match=r"method\.allocation"):
        host.add(SPT(**SMALL))
    assert not host.adapters


@MODELS
def test_the_same_data_give_the_same_allocation(model: str) -> None:
    one, two = (adapted(model, SPT(**SMALL)).state() for _ in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(t, two[n]) for n, t in one.items())


@STRUCTURED
@MODELS
def test_an_adapter_is_read_back_without_data(
    model: str, structured: Structured, tmp_path: Path
) -> None:
    host = adapted(model, SPT(structured=structured, **SMALL))
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.05 * torch.randn_like(p))
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    again = Host(tiny.models()[model]())
    adapter.load(again, tmp_path, "another")
    assert torch.equal(logits(again, model), logits(host, model))


@MODELS
def test_merged_weights_give_the_same_output(model: str) -> None:
    host = adapted(model, SPT(**SMALL))
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.05 * torch.randn_like(p))
    apart = logits(host, model)
    host.merge()
    torch.testing.assert_close(logits(host, model), apart, atol=1e-5, rtol=1e-5)


def test_gradients_of_single_weights_are_those_of_the_dense_one() -> None:
    host = adapted("bert", SPT(dropout=0.0, drop_path=0.0, **SMALL))
    host.model.double()
    batch = tiny.batch("bert")
    host.model(**batch).loss.backward()
    dense = tiny.models()["bert"]().double()
    dense(**batch).loss.backward()
    seen = 0
    for place, delta in host.deltas():
        if isinstance(delta, SparseDelta):
            grad = dense.get_submodule(place.path).weight.grad.flatten()
            torch.testing.assert_close(delta.values.grad, grad[delta.indices])
            seen += 1
    assert seen


def test_only_the_chosen_numbers_of_a_vector_change(make_loop: MakeLoop) -> None:
    q = "model.layers.0.self_attn.q_proj"
    method = SPT(allocation={"model.norm.weight": 5, q: 0})
    loop = make_loop(method=method, max_steps=3, lr=1e-2)
    masks: Any = loop.host.shared()
    before = {n: loop.host.model.get_parameter(n).detach().clone() for n in masks.names}
    assert [int(masks[n].sum()) for n in masks.names] == [5]
    loop.fit()
    for name, start in before.items():
        changed = loop.host.model.get_parameter(name) != start
        assert not changed[~masks[name]].any(), name
        assert changed[masks[name]].any(), name


@STRUCTURED
def test_a_run_that_was_stopped_ends_bit_for_bit_the_same(
    structured: Structured, make_loop: MakeLoop, tmp_path: Path
) -> None:
    options = {"max_steps": 6, "lr": 1e-3, "method": SPT(structured=structured, **SMALL)}
    straight = make_loop(folder=tmp_path / "straight", **options)
    straight.fit()
    paused = interrupted(make_loop, tmp_path / "paused", [3], **options)
    wanted = straight.host.state()
    assert all(torch.equal(t, wanted[n]) for n, t in paused.host.state().items())


def test_the_adapter_reads_the_output_or_beside_the_attentions_output_the_input() -> None:
    x, y = torch.randn(2, 3, 6), torch.randn(2, 3, 4)
    for role, reads in ((None, y), ("o", x)):
        delta = SPTAdapterDelta(site(6, 4, role), 2, 0.0, 0.0)
        with torch.no_grad():
            delta.core.up.weight.normal_()
        h = torch.nn.functional.gelu(delta.core.down(reads))
        torch.testing.assert_close(delta.edit(y, x), y + delta.core.up(h))


def test_paths_are_dropped_by_example_and_scaled_while_training_alone() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    delta = PathLoRADelta(site(6, 4), 2, 0.0, 0.5)
    assert isinstance(delta, LoRADelta)
    nn.init.normal_(delta.B)
    x, layer = torch.randn(64, 3, 6), Bare(linear.requires_grad_(False), nn.Linear)
    whole = delta.eval()(x, layer) - linear(x)
    added = delta.train()(x, layer) - linear(x)
    gone = (added == 0).all(-1).all(-1)
    assert 16 < gone.sum() < 48
    torch.testing.assert_close(added[~gone], 2 * whole[~gone], atol=1e-5, rtol=1e-4)


def test_nothing_is_dropped_before_the_attentions_output() -> None:
    method = SPT(dropout=0.3)
    assert [method.build(site(4, 4, role)).dropout for role in ("q", "o")] == [0.3, 0.0]


def test_a_vit_trains_its_class_token_but_neither_patches_nor_positions() -> None:
    names = set(adapted("vit", SPT(**SMALL)).trained())
    assert "vit.embeddings.cls_token" in names
    assert not any("patch" in n or "position" in n or "classifier" in n for n in names)


def test_gradients_outside_the_masks_are_nothing() -> None:
    host = adapted("llama", SPT(**SMALL))
    host.model(**tiny.batch("llama")).loss.backward()
    masks: Any = host.shared()
    host.adapters["default"].after_backward(host, Step(0, 1, 0.0))
    for name in masks.names:
        grad = host.model.get_parameter(name).grad
        assert grad is not None
        assert not grad[~masks[name]].any()


def test_a_model_without_such_linears_is_refused() -> None:
    host = Host(tiny.models()["llama"]())
    with pytest.raises(NotApplicable, match="no linear"):
        host.add(SPT(target_modules=("embed_tokens",)))
    assert not host.adapters
