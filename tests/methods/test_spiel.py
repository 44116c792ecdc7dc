"""What SpIEL promises: its schedule, its optimizers, its budget, and how positions change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from peftcli.core.host import Host
from peftcli.core.method import Step
from peftcli.core.site import Site
from peftcli.errors import ConfigError, NotApplicable
from peftcli.methods.lora import LoRA
from peftcli.methods.sparse import SparseDelta, random_positions
from peftcli.methods.spiel import (
    SM3,
    AgedAdamW,
    SpIEL,
    _swap_by_gradient,
    best_of_outer,
    seed_moments,
)
from peftcli.models.load import empty_model
from peftcli.settings import Optimizer as OptimizerSettings
from peftcli.train import checkpoint
from peftcli.train.optim import make_optimizer
from tests import tiny
from tests.train import conftest
from tests.train.conftest import MakeLoop, interrupted

make_loop = conftest.make_loop  # the fixture


def delta_of(d_out: int, d_in: int, indices: list[int]) -> SparseDelta:
    site = Site("m", nn.Linear(d_in, d_out), "linear", d_in, d_out)
    return SparseDelta(site, torch.tensor(indices))


def positions(host: Host) -> list[Tensor]:
    return [delta.indices.clone() for _, delta in host.deltas()]


def test_the_published_schedule() -> None:
    method = SpIEL()
    rates = {c: method.rate(c, 1000) for c in range(1, 1001)}
    wanted = {5: 1.0, 25: 0.195, 45: 0.191, 105: 0.179, 505: 0.099}
    assert {c: round(rates[c], 12) for c in wanted} == wanted
    assert [c for c, rate in rates.items() if rate][:3] == [5, 25, 45]
    watched = [c for c in range(1, 46) if method.watches(c)]
    assert watched == [*range(1, 6), *range(20, 26), *range(40, 46)]


def test_the_cosine_policy_has_no_special_first_choice() -> None:
    method = SpIEL(reselection_rate_policy="cosine")
    assert method.rate(5, 1000) == pytest.approx(0.1 * (1 + math.cos(math.pi * 0.005)))
    assert method.rate(505, 1000) == pytest.approx(0.1 * (1 + math.cos(math.pi * 0.505)))
    assert method.rate(6, 1000) == 0.0


def test_phases_end_before_the_next_begins() -> None:
    with pytest.raises(ConfigError, match="must be below"):
        SpIEL(reselection_steps=5, selection_accumulation_steps=5)


def test_sm3_is_the_worked_example() -> None:
    delta = delta_of(2, 3, [0, 4, 5])
    sm3 = SM3([{"params": [delta.values], "deltas": [delta], "lr": 0.1}])
    state = sm3.state[delta.values]
    delta.values.grad = torch.tensor([1.0, 2.0, 3.0])
    sm3.step()
    assert (state["row"].tolist(), state["column"].tolist()) == ([1, 9], [1, 4, 9])
    torch.testing.assert_close(delta.values.data, torch.full((3,), -0.1))
    sm3.step()
    assert (state["row"].tolist(), state["column"].tolist()) == ([2, 18], [2, 8, 18])
    torch.testing.assert_close(delta.values.data, torch.full((3,), -0.1707107))
    scores = torch.outer(state["row"], state["column"])
    assert scores.tolist() == [[4, 16, 36], [36, 144, 324]]
    best = best_of_outer(state["row"], state["column"], delta.indices, 3)
    assert best[0] in (2, 3)
    assert sorted(best.tolist()) == [1, 2, 3]


def test_the_best_of_an_outer_product_are_found_block_by_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peftcli.methods.spiel.AT_ONCE", 20)
    draw = torch.Generator().manual_seed(0)
    row, column = torch.rand(9, generator=draw), torch.rand(7, generator=draw)
    taken = torch.randperm(63, generator=draw)[:20].int()
    scores = torch.outer(row, column).flatten()
    scores[taken] = -1
    best = best_of_outer(row, column, taken, 11)
    assert best.tolist() == scores.topk(11).indices.tolist()
    assert len(best_of_outer(row, column, taken, 60)) == 43  # all that are free


def test_seeded_moments_are_the_worked_example() -> None:
    state = {key: torch.zeros(2) for key in ("age", "exp_avg", "exp_avg_sq")}
    grads = torch.tensor([0.4, 0.2, 0.6])
    seed_moments(
        state, torch.tensor([1]), grads.mean().view(1), grads.square().mean().view(1), age=3
    )
    assert state["age"].tolist() == [0, 3]
    torch.testing.assert_close(state["exp_avg"][1], torch.tensor(0.1084), rtol=1e-6, atol=0)
    wanted = torch.tensor(5.5944e-4)
    torch.testing.assert_close(state["exp_avg_sq"][1], wanted, rtol=1e-4, atol=0)
    corrected = state["exp_avg"][1] / (1 - 0.9**3), state["exp_avg_sq"][1] / (1 - 0.999**3)
    torch.testing.assert_close(torch.stack(corrected), torch.tensor([0.4, 0.1866667]))


def test_the_aged_adam_of_entries_that_are_all_as_old_is_adam() -> None:
    p, q = (nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    ours = AgedAdamW([{"params": [p], "lr": 0.01}])
    theirs = torch.optim.Adam([q], lr=0.01, eps=0.0)
    for step in range(20):
        p.grad = q.grad = torch.linspace(1, 2, 5) * (step % 3 - 0.5)
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)
    assert ours.state[p]["age"].tolist() == [21] * 5


def test_entries_of_different_ages_have_each_their_own_correction() -> None:
    """m / (1 - b1^age) over (sqrt(v) + eps) / sqrt(1 - b2^age), then decay, then age + 1."""
    torch.manual_seed(0)
    age, m, v, g, start = torch.rand(5, 6, dtype=torch.float64) + 0.1
    v, age = v * 1e-12, (age * 10).float()  # so small that eps counts
    p = nn.Parameter(start.clone())
    p.grad = g * 1e-6
    optimizer = AgedAdamW([{"params": [p], "lr": 0.1, "weight_decay": 0.5}])
    optimizer.state[p] = {"age": age.clone(), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.step()
    m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
    spread = (v.sqrt() + 1e-6) / (1 - 0.999**age).sqrt()
    wanted = (start - 0.1 * m / (1 - 0.9**age) / spread) * (1 - 0.1 * 0.5)
    torch.testing.assert_close(p.data, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(optimizer.state[p]["age"], age + 1)


def test_decay_pulls_the_change_to_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.zeros(3)
    AgedAdamW([{"params": [p], "lr": 1e-2, "weight_decay": 30.0}]).step()
    torch.testing.assert_close(p.data, torch.full((3,), 0.7))


def swapped(candidates: list[int], sums: list[float], dropped: list[int]) -> SparseDelta:
    """Positions 0..3 with values 1..4 after a swap of the entries `dropped`."""
    delta = delta_of(2, 5, [0, 1, 2, 3])
    with torch.no_grad():
        delta.values.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    moments = {key: torch.full((4,), 9.0) for key in ("age", "exp_avg", "exp_avg_sq")}
    total = torch.tensor(sums)
    named = torch.tensor(candidates, dtype=torch.int32)
    state = {"candidates": named, "samples": 2, "grad_sum": total, "grad_square_sum": total**2}
    state |= moments
    _swap_by_gradient(delta, state, torch.tensor(dropped))
    assert set(state) == set(moments)
    return delta


def test_grown_entries_have_the_largest_summed_gradients_and_start_at_zero() -> None:
    delta = swapped([5, 6, 7, 8], [1.0, -3.0, 2.0, 0.5], [0, 1])
    assert delta.indices.tolist() == [6, 7, 2, 3]
    assert delta.values.tolist() == [0, 0, 3, 4]


def test_an_entry_that_is_dropped_and_grown_is_kept_as_it_is() -> None:
    delta = swapped([1, 6, 7, 8], [9.0, 3.0, 2.0, 0.5], [0, 1])
    assert delta.indices.tolist() == [6, 1, 2, 3]
    assert delta.values.tolist() == [0, 2, 3, 4]


def test_candidates_that_train_already_grow_nothing() -> None:
    delta = swapped([2, 3, 7, 2], [9.0, 9.0, 1.0, 9.0], [1, 0])
    assert delta.indices.tolist() == [0, 7, 2, 3]  # the first in the order of the dropped
    assert delta.values.tolist() == [1, 0, 3, 4]


LLAMAS = {
    "7b": LlamaConfig(vocab_size=32000),
    "13b": LlamaConfig(
        hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
}


@pytest.mark.parametrize(
    ("size", "of_rank_1", "of_rank_64"),
    [("7b", 2_498_560, 159_907_840), ("13b", 3_911_680, 250_347_520)],
)
def test_the_papers_budgets_are_those_of_lora_on_the_seven_linears(
    size: str, of_rank_1: int, of_rank_64: int
) -> None:
    assert 64 * of_rank_1 == of_rank_64
    host = Host(empty_model(LLAMAS[size], "causal_lm"))
    host.add(LoRA(r=1, target_modules="all-linear"))
    assert host.num_parameters()[0] == of_rank_1
    host.remove("default")
    host.add(SpIEL(num_tunable_weights=of_rank_1))
    assert of_rank_1 - len(host.sites["default"]) < host.num_parameters()[0] <= of_rank_1


def test_the_budget_of_rank_64_on_a_7b_llama() -> None:
    host = Host(empty_model(LLAMAS["7b"], "causal_lm"))
    host.add(SpIEL(num_tunable_weights=64 * 2_498_560))
    counts = {site.role: delta.values.numel() for site, delta in host.deltas()}
    assert all(counts[role] == 414_269 for role in ("q", "k", "v", "o"))
    assert all(counts[role] == 1_113_347 for role in ("gate", "up", "down"))
    trained, every = host.num_parameters()
    assert trained == 159_907_744
    assert round(100 * trained / (every - trained), 2) == 2.37
    assert {delta.indices.dtype for _, delta in host.deltas()} == {torch.int32}


def test_positions_of_a_weight_of_two_billion_entries_are_wide() -> None:
    types = [
        SparseDelta(Site("m", nn.Linear(1, 1), "linear", d_in, 2**16), torch.tensor([5])).indices
        for d_in in (2**15 - 1, 2**15)
    ]
    assert [t.dtype for t in types] == [torch.int32, torch.int64]


def test_the_density_is_of_the_whole_model() -> None:
    model = tiny.models()["llama"]()
    budget = int(0.05 * sum(p.numel() for p in model.parameters()))
    host = Host(model)
    host.add(SpIEL(density=0.05))
    assert budget - len(host.sites["default"]) < host.num_parameters()[0] <= budget


def test_a_base_in_four_bits_has_the_budget_of_the_same_base_in_32() -> None:
    model = tiny.models()["llama"]()
    plain, packed = Host(model), Host(tiny.quantised(tiny.models()["llama"](), "nf4"))
    for host in (plain, packed):
        host.add(SpIEL())
    assert plain.num_parameters()[0] == packed.num_parameters()[0]


def test_a_budget_below_one_weight_a_target_is_refused() -> None:
    host = Host(tiny.models()["llama"]())
    with pytest.raises(NotApplicable, match="too few"):
        host.add(SpIEL(num_tunable_weights=2))
    with pytest.raises(ConfigError, match="fewer than"):
        host.add(SpIEL(target_modules=("q",), density=0.5))


def test_the_start_is_a_random_subset_in_ascending_order() -> None:
    site = Site("m", nn.Linear(10, 20), "linear", 10, 20)
    torch.manual_seed(0)
    one, two = random_positions(site, 50), random_positions(site, 50)
    assert (one.diff() > 0).all()
    assert not torch.equal(one, two)


@dataclass(frozen=True)
class Watched(SpIEL):
    """Looks at all entries around every choice."""

    def after_step(self, host: Host, t: Step) -> None:
        before = [(d.indices.clone(), d.values.detach().clone()) for _, d in host.deltas()]
        super().after_step(host, t)
        moved = 0
        for (_, delta), (indices, values) in zip(host.deltas(), before, strict=True):
            new = delta.indices != indices
            assert not delta.values[new].any()
            assert torch.equal(delta.values[~new], values[~new])
            assert len(delta.indices.unique()) == len(indices)
            if self.growth == "ma":  # what trained before the choice is not chosen
                assert not torch.isin(delta.indices[new], indices).any()
                assert new.all() or t.index + 1 != 2  # and the first choice moves all
            moved += int(new.sum())
        assert (moved > 0) == (t.index + 1 in (2, 6)), t


@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_positions_change_when_it_is_time_and_stay_unique(
    growth: Literal["ag", "ma"], make_loop: MakeLoop
) -> None:
    method = Watched(
        growth=growth,
        density=0.02,
        reselection_steps=4,
        selection_accumulation_steps=2,
        initial_reselection_rate=0.9,
    )
    make_loop(method=method, lr=1e-3, max_steps=9, gradient_accumulation_steps=2).fit()


@pytest.mark.parametrize("accumulation", [1, 3])
def test_samples_are_the_gradients_of_steps(accumulation: int) -> None:
    host = Host(tiny.models()["llama"]())
    method = SpIEL(target_modules=("q",))
    host.add(method)
    make_optimizer(OptimizerSettings("torch.optim.AdamW", 1e-3, 0.0), method, host)
    site, delta = next(host.deltas())
    t, batch = Step(0, 10, 0.0), tiny.batch("llama")
    method.before_step(host, t)
    for _ in range(accumulation):
        (host.model(**batch).loss / accumulation).backward()
    method.after_backward(host, t)
    state = host.optimizer_state(delta.values)
    weight = site.module.weight.requires_grad_()
    with host.disabled():
        host.model(**batch).loss.backward()
    wanted = weight.grad.flatten()
    torch.testing.assert_close(
        state["grad_sum"].abs().sort().values, wanted.abs().topk(len(delta.values)).values.flip(0)
    )
    torch.testing.assert_close(state["grad_sum"], wanted[state["candidates"]])
    torch.testing.assert_close(state["grad_square_sum"], wanted[state["candidates"]] ** 2)
    torch.testing.assert_close(delta.values.grad, wanted[delta.indices])
    assert state["samples"] == 1


def test_numbers_that_are_not_finite_are_no_samples() -> None:
    host = Host(tiny.models()["llama"]())
    method = SpIEL(target_modules=("q",))
    host.add(method)
    make_optimizer(OptimizerSettings("torch.optim.AdamW", 1e-3, 0.0), method, host)
    t, before = Step(0, 10, 0.0), positions(host)
    method.before_step(host, t)
    (host.model(**tiny.batch("llama")).loss * math.inf).backward()
    method.after_backward(host, t)
    assert not any(host.optimizer_state(d.values) for _, d in host.deltas())
    method.after_step(host, Step(4, 10, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(positions(host), before, strict=True))


@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_a_run_stopped_within_a_phase_ends_bit_for_bit_the_same(
    growth: Literal["ag", "ma"], make_loop: MakeLoop, tmp_path: Path
) -> None:
    method = SpIEL(growth=growth, density=0.02, reselection_steps=4, selection_accumulation_steps=2)
    options = {"max_steps": 8, "lr": 1e-3, "method": method, "gradient_accumulation_steps": 2}
    straight = make_loop(folder=tmp_path / "straight", **options)
    straight.fit()
    paused = interrupted(make_loop, tmp_path / "paused", [1, 4, 5], **options)
    wanted = straight.host.state()
    assert all(torch.equal(t, wanted[n]) for n, t in paused.host.state().items())
    ends = [dict(checkpoint._optimizer_tensors(loop._parts())) for loop in (straight, paused)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())
