"""What LISA promises: when blocks switch, what trains meanwhile, and what the optimizer keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from peftcli.core.host import Host
from peftcli.core.method import Step
from peftcli.methods.full import Full
from peftcli.methods.lisa import LISA
from peftcli.models.load import empty_model
from peftcli.train.objective import Totals
from tests import tiny
from tests.train.conftest import MakeLoop, interrupted, make_loop, one_thread  # noqa: F401


def blocks_of(host: Host) -> set[str]:
    """Blocks with something that trains."""
    return {str(host.layout.block_path_of(n)) for n in host.trained()} - {"None"}


def added(**options: object) -> tuple[Host, LISA]:
    host, method = Host(tiny.models()["llama"]()), LISA(**options)
    host.add(method)
    return host, method


def test_blocks_switch_at_multiples_of_the_interval_only() -> None:
    host, method = added(gamma=1)
    seen = []
    for step in range(60):
        method.before_step(host, Step(step, 60, 0.0))
        seen.append(blocks_of(host))
    assert all(len(blocks) == 1 for blocks in seen)
    assert all(seen[i] == seen[i - 1] for i in range(1, 60) if i % 20)
    assert [set(method.drawn(host, period)) for period in range(3)] == [seen[0], seen[20], seen[40]]


def test_embeddings_norm_and_head_always_train_with_exactly_gamma_blocks() -> None:
    host, method = added(gamma=2, interval_steps=1)
    for step in range(8):
        method.before_step(host, Step(step, 8, 0.0))
        host.model(**tiny.batch("llama")).loss.backward()
        with_gradient = {n for n, p in host.model.named_parameters() if p.grad is not None}
        assert {"model.embed_tokens.weight", "model.norm.weight"} < with_gradient
        assert len({host.layout.block_path_of(n) for n in with_gradient} - {None}) == 2
        host.model.zero_grad()


def test_parameters_of_llama_2_7b_at_a_time() -> None:
    config = LlamaConfig(intermediate_size=11008, tie_word_embeddings=False)
    host = Host(empty_model(config, "causal_lm"))
    host.add(LISA())
    host.adapters["default"].before_step(host, Step(0, 1, 0.0))
    assert host.num_parameters() == (666_914_816, 6_738_415_616)


def test_draws_depend_on_the_seed_and_the_period_alone() -> None:
    hosts = [added(gamma=1) for _ in range(2)]
    first, second = ([m.drawn(h, p) for p in range(20)] for h, m in hosts)
    torch.manual_seed(5)
    assert first == second
    assert first != [LISA(gamma=1, seed=1).drawn(hosts[0][0], p) for p in range(20)]


def test_bernoulli_draws_gamma_blocks_on_average() -> None:
    host, method = added(gamma=1, sampling="bernoulli")
    sizes = [len(method.drawn(host, period)) for period in range(600)]
    assert set(sizes) == {0, 1, 2, 3}
    assert sum(sizes) / 600 == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("state", ["drop", "keep"])
def test_the_optimizer_keeps_what_its_policy_says(
    state: str,
    make_loop: MakeLoop,  # noqa: F811
    tmp_path: Path,
) -> None:
    method = LISA(gamma=1, interval_steps=2, state=state)
    loop = make_loop(folder=tmp_path / "run", method=method, max_steps=8, lr=1e-3)
    states = []
    step = loop.step

    def watched(examples: list) -> None:
        before = {n: p.clone() for n, p in loop.host.model.named_parameters()}
        step(examples)
        active = set(loop.host.trained())
        changed = {n for n, p in loop.host.model.named_parameters() if not p.equal(before[n])}
        assert changed == active  # weight decay is on, and rests too
        states.append({id(p) for p, s in loop.optimizer.state.items() if s})
        mine = {id(p) for p in loop.host.trained().values()}
        assert mine <= states[-1]
        assert (states[-1] == mine) or state == "keep"

    loop.step = watched
    loop.fit()
    names = {id(p): n for n, p in loop.host.model.named_parameters()}
    steps = {names[id(p)]: int(s["step"]) for p, s in loop.optimizer.state.items() if s}
    periods = [method.drawn(loop.host, i)[0] for i in range(4)]
    last = [p for p in periods if p == periods[-1]]
    run = next(i for i, p in enumerate([*periods[::-1], None]) if p != periods[-1])
    wanted = 2 * (run if state == "drop" else len(last))
    assert steps["model.norm.weight"] == 8
    assert steps[f"{periods[-1]}.mlp.up_proj.weight"] == wanted


@pytest.mark.parametrize("state", ["drop", "keep"])
def test_weights_are_those_of_adamw_made_anew_for_a_block_that_enters_or_of_one_for_all(
    state: str,
    make_loop: MakeLoop,  # noqa: F811
    tmp_path: Path,
) -> None:
    options = {"max_steps": 8, "lr": 1e-3, "max_grad_norm": 100.0}
    method = LISA(gamma=1, interval_steps=2, state=state)
    loop = make_loop(folder=tmp_path / "run", method=method, **options)
    plain = make_loop(folder=tmp_path / "plain", method=Full(), **options)
    named = plain.host.trained()
    made: dict[str, torch.optim.AdamW] = {}

    def optimizer_of(part: str) -> torch.optim.AdamW:
        mine = [p for n, p in named.items() if (plain.host.layout.block_path_of(n) or "") == part]
        groups = [
            {"params": [p for p in mine if (p.ndim >= 2) == decays], "weight_decay": 0.01 * decays}
            for decays in (True, False)
        ]
        return torch.optim.AdamW(groups, lr=1e-3)

    for s in range(8):
        active = {"", *method.drawn(plain.host, s // 2)}
        if state == "drop":  # what left is forgotten
            made = {part: held for part, held in made.items() if part in active}
        for name, p in named.items():
            p.requires_grad_((plain.host.layout.block_path_of(name) or "") in active)
        rows = plain.plan.rows(plain.order(s // plain.plan.steps_per_epoch), s)
        (share,) = plain.shares([plain.examples[i] for i in rows])
        plain.forward_backward([share], Totals.of([share.batch]))
        for part in active:
            made.setdefault(part, optimizer_of(part))
            for group in made[part].param_groups:
                group["lr"] = plain.scheduler.get_last_lr()[0]
            made[part].step()
        for p in named.values():
            p.grad = None
        plain.optimizer.step()  # nothing to do: for the schedule's sake
        plain.scheduler.step()
    loop.fit()
    for name, p in loop.host.model.named_parameters():
        torch.testing.assert_close(p, named[name], atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "parts", "wanted"),
    [
        ("gpt2", ("embed",), {"transformer.wte.weight", "transformer.wpe.weight"}),
        ("gpt2", ("norm",), {"transformer.ln_f.weight", "transformer.ln_f.bias"}),
        ("llama", ("head",), set()),  # tied to the embeddings
        ("vit", ("norm",), {"vit.layernorm.weight", "vit.layernorm.bias"}),
        ("vit", ("head",), {"classifier.weight", "classifier.bias"}),
        ("t5", ("norm",), {f"{s}.final_layer_norm.weight" for s in ("encoder", "decoder")}),
    ],
)
def test_only_the_parts_outside_of_the_blocks_that_are_asked_for_train_always(
    model: str, parts: Any, wanted: set[str]
) -> None:
    host = Host(tiny.models()[model]())
    host.add(LISA(gamma=1, always_on=parts))
    host.adapters["default"].before_step(host, Step(0, 1, 0.0))
    assert {n for n in host.trained() if host.layout.block_path_of(n) is None} == wanted
    assert len(blocks_of(host)) == 1
    every = Host(tiny.models()[model]())
    every.add(LISA(gamma=1))
    assert set(every.selected) == {n for n, _ in every.model.named_parameters()}


@pytest.mark.parametrize("state", ["drop", "keep"])
def test_a_stopped_run_goes_on_within_and_between_periods(
    state: str,
    make_loop: MakeLoop,  # noqa: F811
    tmp_path: Path,
) -> None:
    options = {
        "method": LISA(gamma=1, interval_steps=3, state=state),
        "max_steps": 8,
        "lr": 1e-3,
    }
    straight = make_loop(folder=tmp_path / "straight", **options)
    straight.fit()
    wanted = {n: t.clone() for n, t in straight.host.state().items()}
    paused = interrupted(make_loop, tmp_path / "paused", [3, 5], **options)
    assert all(torch.equal(t, wanted[n]) for n, t in paused.host.state().items())


def test_all_blocks_at_a_time_is_full_fine_tuning(
    make_loop: MakeLoop,  # noqa: F811
    tmp_path: Path,
) -> None:
    ends = []
    for method in (LISA(gamma=3, interval_steps=2), Full()):
        loop = make_loop(folder=tmp_path / str(len(ends)), method=method, max_steps=5, lr=1e-3)
        loop.fit()
        ends.append({n: t.clone() for n, t in loop.host.state().items()})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())
