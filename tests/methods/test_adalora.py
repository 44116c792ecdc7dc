"""What AdaLoRA's paper promises: the budget, the scores, the masks, peft's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config

from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.method import Step
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.export import adapter
from peftcli.methods.adalora import AdaLoRA, AdaLoRADelta, prune
from peftcli.methods.lora import LoRADelta
from peftcli.models.load import empty_model
from tests import tiny
from tests.train import conftest
from tests.train.conftest import MakeLoop, interrupted

make_loop = conftest.make_loop  # the fixture


def site_of(module: nn.Module) -> Site:
    d_out, d_in = weights.shape(module)
    groups = getattr(module, "groups", 1)
    return Site("m", module, weights.kind_of(module), d_in, d_out, groups=groups)


def outputs(model: nn.Module, name: str = "llama") -> Tensor:
    with torch.no_grad():
        return model.eval()(**tiny.batch(name)).logits


def grown(method: AdaLoRA, model: str = "llama") -> Host:
    """An adapter off its start, of which a part of the triplets is pruned."""
    torch.manual_seed(4)
    host = Host(tiny.models()[model]())
    host.add(method)
    deltas = [d for _, d in host.deltas() if isinstance(d, AdaLoRADelta)]
    with torch.no_grad():
        for delta in deltas:
            delta.E.normal_()
            delta.A.normal_(std=0.2)
            delta.B.normal_(std=0.2)
            delta.gradients = {n: torch.randn_like(delta.get_parameter(n)) for n in "AEB"}
            delta.update_scores(0.85, 0.85)
        prune(deltas, len(deltas))
    return host


def test_singular_values_do_not_decay() -> None:
    host = Host(tiny.llama())
    host.add(AdaLoRA())
    groups = host.adapters["default"].param_groups(host, 1e-3, 0.1)
    resting = {p for g in groups if not g["weight_decay"] for p in g["params"]}
    deltas = [d for _, d in host.deltas() if isinstance(d, AdaLoRADelta)]
    assert resting == {d.E for d in deltas}
    assert {p for g in groups for p in g["params"]} - resting == {
        p for d in deltas for p in (d.A, d.B)
    }


def test_the_start_is_small_and_changes_nothing() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(300, 200)
    delta = AdaLoRA().build(site_of(linear))
    for p in (delta.A, delta.B):
        assert p.std().item() == pytest.approx(0.02, rel=0.05)
    assert not delta.delta(linear.weight).any()
    assert delta.scale == 16 / (12 + 1e-5)
    assert AdaLoRA(alpha=0.0).build(site_of(linear)).scale == 12 / (12 + 1e-5)


def test_the_budget_falls_cubically() -> None:
    method = AdaLoRA(init_r=144, target_r=96, tinit=100, tfinal=300)
    steps = [100, 101, 110, 200, 300, 400, 500, 600, 700, 1000]
    wanted = [144, 143, 141, 123, 110, 102, 97, 96, 96, 96]
    assert [method.budget(t, 1000, 1) for t in steps] == wanted
    assert AdaLoRA(init_r=12, target_r=8).budget(10, 10, 12) == 96


def test_the_first_scores_are_the_worked_ones() -> None:
    delta = AdaLoRADelta(site_of(nn.Linear(2, 2)), 2, 1.0)
    with torch.no_grad():
        delta.A.copy_(torch.tensor([[1.0, 2], [3, 4]]))
        delta.E.copy_(torch.tensor([[1.0], [2]]))
        delta.B.copy_(torch.tensor([[1.0, 1], [1, 2]]))
        delta.gradients = {
            "A": torch.tensor([[0.1, 0.1], [0.2, 0]]),
            "E": torch.tensor([[0.5], [0.1]]),
            "B": torch.tensor([[0.1, 0.3], [0.2, 0.1]]),
        }
        delta.update_scores(0.85, 0.85)
    torch.testing.assert_close(
        delta.scores(), torch.tensor([0.005738, 0.005451]), atol=1e-6, rtol=0
    )
    element = torch.mul(delta.sensitivity_E, delta.uncertainty_E)
    torch.testing.assert_close(element, 0.019125 * torch.tensor([[0.25], [0.04]]))


def test_averages_take_the_new_average_for_the_deviation() -> None:
    delta = AdaLoRADelta(site_of(nn.Linear(3, 3)), 1, 1.0)
    mean = spread = torch.zeros(1, 1)
    with torch.no_grad():
        delta.E.fill_(2.0)
        for g in (0.3, -0.1, 0.7):
            delta.gradients = {"E": torch.tensor([[g]])}
            delta.update_scores(0.8, 0.6)
            now = torch.tensor([[2 * abs(g)]])
            mean = 0.8 * mean + 0.2 * now
            spread = 0.6 * spread + 0.4 * (now - mean).abs()
    torch.testing.assert_close(delta.sensitivity_E, mean)
    torch.testing.assert_close(delta.uncertainty_E, spread)


def test_gradients_that_are_not_finite_leave_the_scores_alone() -> None:
    delta = AdaLoRADelta(site_of(nn.Linear(3, 3)), 1, 1.0)
    with torch.no_grad():
        delta.gradients = {"A": torch.full((1, 3), float("nan"))}
        delta.update_scores(0.85, 0.85)
    assert not delta.scores().any()


def test_exactly_the_budget_keeps_its_singular_values() -> None:
    torch.manual_seed(0)
    deltas = [AdaLoRADelta(site_of(nn.Linear(6, 5)), 4, 1.0) for _ in range(3)]
    with torch.no_grad():
        for delta in deltas:
            delta.E.normal_()
            delta.gradients = {n: torch.randn_like(delta.get_parameter(n)) for n in "AEB"}
            delta.update_scores(0.85, 0.85)
        scores = torch.cat([d.scores() for d in deltas])
        prune(deltas, 0)
        assert all(d.kept.all() for d in deltas)
        prune(deltas, 5)
    alive = torch.cat([d.E[:, 0] != 0 for d in deltas])
    assert alive.sum() == 12 - 5
    assert scores[alive].min() > scores[~alive].max()
    assert torch.equal(alive, torch.cat([d.kept for d in deltas]))


def test_triplets_of_equal_scores_are_pruned_together() -> None:
    delta = AdaLoRADelta(site_of(nn.Linear(4, 4)), 4, 1.0)
    with torch.no_grad():
        delta.E.fill_(1.0)
        delta.gradients = {"E": torch.tensor([[1.0], [2], [2], [3]])}
        delta.update_scores(0.85, 0.85)
        prune([delta], 2)
    assert delta.kept.tolist() == [False, False, False, True]


def test_the_penalty_is_a_mean_that_orthogonal_factors_do_not_pay() -> None:
    host = Host(tiny.models()["llama"]())
    few = AdaLoRA(init_r=4, target_r=2, orth_reg=0.3, target_modules=("q",))
    host.add(few)
    with torch.no_grad():
        for _, delta in host.deltas():
            nn.init.orthogonal_(delta.A)
            nn.init.orthogonal_(delta.B)
    assert few.penalty(host).item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for _, delta in host.deltas():
            delta.A.mul_(2)  # A A' - 1 = 3, of norm 3 sqrt(4); half of the tensors
    assert few.penalty(host).item() == pytest.approx(0.3 * 6 / 2, rel=1e-4)
    once = few.penalty(host)
    twice = Host(tiny.models()["llama"]())
    many = AdaLoRA(init_r=4, target_r=2, orth_reg=0.3, target_modules=("q", "o"))
    twice.add(many)
    with torch.no_grad():
        for (_, delta), source in zip(twice.deltas(), [*host.deltas()] * 2, strict=True):
            delta.A.copy_(source[1].A)
            delta.B.copy_(source[1].B)
    torch.testing.assert_close(many.penalty(twice), once)


def test_a_schedule_without_a_step_to_prune_in_is_refused() -> None:
    host = Host(tiny.models()["llama"]())
    method = AdaLoRA(tinit=4, tfinal=6)
    with pytest.raises(ConfigError, match="leave none of the 10 steps"):
        method.before_step(host, Step(0, 10, 0.0))
    with pytest.raises(ConfigError, match=r"target_r=8: must not be above method\.init_r=4"):
        host.add(AdaLoRA(init_r=4))


def test_grouped_convolutions_are_refused() -> None:
    with pytest.raises(ConfigError, match="2 convolution groups"):
        AdaLoRA().build(site_of(nn.Conv2d(4, 6, 3, groups=2)))


def test_a_convolution_folds() -> None:
    from peftcli.core.layer import Bare

    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    delta = AdaLoRA(init_r=3, target_r=2).build(site_of(module))
    with torch.no_grad():
        delta.E.normal_()
    layer, x = Bare(module, type(module)), torch.randn(2, 4, 9, 9)
    W, b = delta.merged(layer.weight, layer.bias)
    torch.testing.assert_close(layer.linear(x, W, b), delta(x, layer), atol=1e-6, rtol=1e-5)


def test_the_pruned_update_is_a_lora_of_its_own_rank() -> None:
    linear = nn.Linear(8, 6)
    delta = AdaLoRA(init_r=6, target_r=2, alpha=9.0).build(site_of(linear))
    with torch.no_grad():
        delta.E.copy_(torch.tensor([[1.0], [0], [2], [0], [0], [3]]))
    alive = delta.E[:, 0] != 0
    lora = LoRADelta(site_of(linear), 3, 9.0 * 3 / 6 / 3)  # alpha r_kept / r0, over r_kept
    with torch.no_grad():
        lora.A.copy_((delta.A * delta.E)[alive])
        lora.B.copy_(delta.B[:, alive])
    torch.testing.assert_close(
        lora.delta(linear.weight), delta.delta(linear.weight), atol=1e-7, rtol=1e-5
    )


@pytest.mark.parametrize(("r", "count"), [(1, 165_888), (2, 331_776), (8, 1_327_104)])
def test_the_papers_counts(r: int, count: int) -> None:
    config = DebertaV2Config(
        vocab_size=128100,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        relative_attention=True,
        position_buckets=256,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
    )
    host = Host(empty_model(config, "classification"))
    host.add(AdaLoRA(init_r=r, target_r=1))
    assert len(host.sites["default"]) == 6 * 12
    assert host.num_parameters()[0] == count + 72 * r  # the singular values


# -- training --------------------------------------------------------------------------------------
SCHEDULE = AdaLoRA(init_r=3, target_r=1, tinit=2, tfinal=3, deltaT=2)


def alive(host: Host) -> Tensor:
    return torch.cat([d.E[:, 0] != 0 for _, d in host.deltas() if isinstance(d, AdaLoRADelta)])


def test_training_prunes_to_the_target_and_then_keeps_the_ranks(make_loop: MakeLoop) -> None:
    loop = make_loop(method=SCHEDULE, max_steps=10)
    counts, masks = [], []
    step = loop.method.after_step

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(SCHEDULE, name)

        def after_step(self, host: Host, t: Step) -> None:
            step(host, t)
            counts.append(int(alive(host).sum()))
            masks.append(alive(host))

    loop.method = Watched()
    loop.fit()
    sites = len(loop.host.sites["default"])
    due = {t: SCHEDULE.budget(t, 10, sites) for t in (4, 6, 7, 8, 9, 10)}
    assert {t: counts[t - 1] for t in due} == due
    assert counts[0] == counts[2] == 3 * sites
    assert counts[4] > counts[3]  # between two prunings what was pruned comes back
    assert due[7] == sites
    assert all(torch.equal(mask, masks[6]) for mask in masks[7:])


def test_scores_take_the_clipped_gradients_and_the_new_weights(make_loop: MakeLoop) -> None:
    loop = make_loop(method=SCHEDULE, max_steps=10, max_grad_norm=1e-3)
    loop.log = loop.open_log(loop.progress)
    loop.step([loop.examples[i] for i in range(4)])
    deltas = [d for _, d in loop.host.deltas() if isinstance(d, AdaLoRADelta)]
    moments = [loop.optimizer.state[d.E]["exp_avg"] / 0.1 for d in deltas]  # the gradients
    assert sum(m.square().sum() for m in moments).sqrt() <= 1.01e-3
    for delta, gradient in zip(deltas, moments, strict=True):
        wanted = 0.15 * (delta.E * gradient).abs()
        torch.testing.assert_close(delta.sensitivity_E, wanted, rtol=1e-4, atol=1e-12)


def test_the_penalty_is_logged_beside_the_loss_of_the_task(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    records = {}
    for weight in (0.0, 0.5):
        method = AdaLoRA(init_r=4, target_r=2, orth_reg=weight)
        loop = make_loop(folder=tmp_path / str(weight), method=method, max_steps=2)
        loop.fit()
        lines = loop.folder.metrics.read_text().splitlines()
        records[weight] = [json.loads(line) for line in lines]
    first, free = records[0.5][0], records[0.0][0]
    assert first["loss"] == free["loss"]
    assert first["grad_norm"] > free["grad_norm"]
    assert free["penalty"] == 0.0
    started = make_loop(method=AdaLoRA(init_r=4, target_r=2, orth_reg=0.5))
    assert first["penalty"] == pytest.approx(started.method.penalty(started.host).item())


def test_a_run_that_was_stopped_has_the_same_masks(make_loop: MakeLoop, tmp_path: Path) -> None:
    options = {"max_steps": 10, "method": SCHEDULE}
    straight = make_loop(folder=tmp_path / "straight", **options)
    straight.fit()
    paused = interrupted(make_loop, tmp_path / "paused", [3, 6], **options)
    assert torch.equal(alive(paused.host), alive(straight.host))
    ours, theirs = paused.host.state(), straight.host.state()
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())


# -- peft ------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")  # peft finds its own keys odd
@pytest.mark.parametrize(
    ("model", "targets"),
    [("llama", "all-linear"), ("gpt2", ("q", "v", "down")), ("vit", (".*projection", "q"))],
    ids=["llama", "gpt2", "vit"],
)
def test_our_pruned_adapter_computes_the_same_in_stock_peft_and_loads_again(
    model: str, targets: Any, tmp_path: Path
) -> None:
    host = grown(AdaLoRA(init_r=4, target_r=2, alpha=5.0, target_modules=targets), model)
    task: Any = "image_classification" if model == "vit" else "causal_lm"
    adapter.save(host, "default", tmp_path, task, "base")
    config = adapter.read_config(tmp_path)
    assert not all(all(rows) for rows in config["rank_pattern"].values())
    theirs = peft.PeftModel.from_pretrained(tiny.models()[model](), tmp_path, is_trainable=True)
    ours = outputs(host.model, model)
    torch.testing.assert_close(outputs(theirs, model), ours, atol=5e-6, rtol=1e-5)
    again = Host(tiny.models()[model]())
    adapter.load(again, tmp_path)
    assert type(again.adapters["default"]) is AdaLoRA
    torch.testing.assert_close(outputs(again.model, model), ours, atol=5e-6, rtol=1e-5)
    deltas = [d for _, d in again.deltas() if isinstance(d, AdaLoRADelta)]
    assert all(torch.equal(d.kept, d.E[:, 0] != 0) for d in deltas)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("pruned", [False, True])
def test_stock_pefts_adapter_loads_here(pruned: bool, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, lora_alpha=5, total_step=9, target_modules=["q_proj", "down_proj"]
    )
    theirs = peft.get_peft_model(tiny.models()["llama"](), config)
    torch.manual_seed(2)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.normal_(std=0.3)
    if pruned:
        theirs(**tiny.batch("llama")).loss.backward()
        for step in (4, 9):
            theirs.base_model.update_and_allocate(step)
    theirs.save_pretrained(tmp_path)
    host = Host(tiny.models()["llama"]())
    adapter.load(host, tmp_path)
    assert type(host.adapters["default"]) is AdaLoRA
    assert bool(alive(host).all()) != pruned
    torch.testing.assert_close(outputs(host.model), outputs(theirs), atol=5e-6, rtol=1e-5)
