"""What ID3 promises: its schedule, its choice, and that it equals a dense masked Adam."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config

from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.core.method import Step
from peftcli.errors import ConfigError, NotApplicable
from peftcli.export import adapter
from peftcli.kernels import choice
from peftcli.methods.id3 import ID3, Budget, first_largest
from peftcli.methods.lora import LoRA
from peftcli.models.load import empty_model
from peftcli.train.objective import Totals
from tests import tiny
from tests.train import conftest
from tests.train.conftest import MakeLoop, interrupted

make_loop = conftest.make_loop  # the fixture


def adapted(**fields: Any) -> tuple[Host, ID3, Budget]:
    host, method = Host(tiny.models()["llama"]()), ID3(**fields)
    host.add(method)
    return host, method, cast(Budget, host.shared())


def test_the_budget_is_spent_evenly_and_the_first_steps_get_the_rest() -> None:
    def counts(B: int, T: int) -> list[int]:
        return [ID3().num_unmasked(B, s, T) for s in range(T + 3)]

    assert counts(10, 4) == [3, 3, 2, 2, 0, 0, 0]
    assert sum(sum(counts(10, 4)[: s + 1]) for s in range(4)) == 27  # updates of single scalars
    assert counts(100_000, 3000) == [34] * 1000 + [33] * 2000 + [0] * 3
    assert counts(2, 4) == [1, 1, 0, 0, 0, 0, 0]
    assert ID3(max_steps=1).num_unmasked(10, 0, 4) == 10
    assert ID3(max_steps=1).num_unmasked(10, 1, 4) == 0


@pytest.mark.parametrize(
    ("exp", "wanted", "best"),
    [(0.0, [0.4, 0.2, 1.0, 0.05], 2), (1.0, [0.798403, 1.980198, 0.499750, 50.0], 3)],
)
def test_scores_are_the_worked_example(exp: float, wanted: list[float], best: int) -> None:
    linear = nn.Linear(4, 1, bias=False)
    linear.weight.data = torch.tensor([[0.5, -0.1, 2.0, 0.0]])
    H = ID3(exp=exp).score(torch.tensor([0.4, -0.2, 1.0, 0.05]), linear.weight.flatten)
    torch.testing.assert_close(H, torch.tensor(wanted), rtol=1e-6, atol=1e-6)
    assert first_largest(H, 1).tolist() == [best]


def test_of_equal_scores_the_first_are_chosen_and_what_is_chosen_stays() -> None:
    H = torch.ones(4)
    H[0] = -1.0  # chosen before
    assert first_largest(H, 2).tolist() == [1, 2]
    assert first_largest(torch.tensor([2.0, 1.0, 3.0, 2.0, 2.0]), 3).tolist() == [0, 2, 3]
    budget = Budget(3, 4, torch.device("cpu"))
    budget.spend(torch.tensor([0]))
    budget.spend(torch.tensor([1, 2]))
    assert budget.positions.tolist() == [0, 1, 2]


def test_positions_that_wait_give_way_and_all_stay_different() -> None:
    budget = Budget(4, 8, torch.device("cpu"))
    assert budget.positions.tolist() == [0, 2, 4, 6]
    budget.spend(torch.tensor([4, 7]))
    assert budget.positions.tolist() == [4, 7, 0, 2]
    budget.spend(torch.tensor([1]))
    assert budget.positions.tolist() == [4, 7, 1, 0]


@pytest.mark.parametrize("over", [False, True])
def test_pafi_trains_the_smallest_weights_from_the_first_step_on(
    over: bool, make_loop: MakeLoop
) -> None:
    method = ID3(budget=12, criterion="magnitude", max_steps=1, **(LORA if over else {}))
    loop = make_loop(method=method, max_steps=2)
    host = loop.host
    start = (
        [p.detach().clone() for p in of_the_adapter(host).values()]
        if over
        else [site.weight for site, _ in host.deltas()]
    )
    flat = torch.cat([w.flatten() for w in start]).abs()
    wanted = flat.argsort(stable=True)[:12].sort().values  # of LoRA: zeros of the first B
    loop.fit()
    if over:
        pairs = zip(of_the_adapter(host).values(), start, strict=True)
        moved = torch.cat([(p != s).flatten() for p, s in pairs])
        assert moved.nonzero().view(-1).tolist() == wanted.tolist()
    else:
        assert cast(Budget, host.shared()).positions.sort().values.tolist() == wanted.tolist()


@dataclass(frozen=True)
class Watched(ID3):
    """Looks at the budget after every step."""

    seen: list[list[int]] = field(default_factory=list)

    def after_step(self, host: Host, t: Step) -> None:
        budget = cast(Budget, host.shared())
        spent = int(budget.spent)
        self.seen.append(budget.positions[:spent].tolist())
        assert len(budget.positions.unique()) == len(budget.positions)
        assert budget.values[:spent].all()  # what is unmasked moves in the same step
        assert not budget.values[spent:].any()


@pytest.mark.parametrize(("budget", "steps"), [(10, None), (10, 3), (4, None)])
def test_the_mask_only_grows_and_nothing_else_moves(
    budget: int, steps: int | None, make_loop: MakeLoop
) -> None:
    method = Watched(budget=budget, max_steps=steps)
    loop = make_loop(method=method, lr=1e-3, max_steps=6, gradient_accumulation_steps=2)
    loop.fit()
    T = steps or 6
    counts = [method.num_unmasked(budget, s, 6) for s in range(6)]
    assert [len(seen) for seen in method.seen] == [sum(counts[: s + 1]) for s in range(6)]
    assert len(method.seen[T - 1]) == len(method.seen[-1]) == budget
    for before, after in zip(method.seen, method.seen[1:], strict=False):
        assert after[: len(before)] == before
    base = dict(tiny.models()["llama"]().named_parameters())
    loop.host.merge()
    changed = [
        int((p != base[n]).sum()) for n, p in loop.host.model.named_parameters() if n in base
    ]
    assert sum(changed) == budget


@pytest.mark.parametrize("exp", [0.0, 1.0])
def test_the_run_is_that_of_a_dense_masked_adam(exp: float) -> None:
    B, T, lr = 10, 4, 0.01
    host, method, budget = adapted(budget=B, exp=exp, target_modules=("q", "down"))
    dense = tiny.models()["llama"]().double().requires_grad_(False)
    host.model.double()
    weights = [dense.get_submodule(site.path).weight.requires_grad_() for site, _ in host.deltas()]
    masks = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
    theirs = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    ours = torch.optim.AdamW(method.param_groups(host, lr, 0.01))
    late = moved = torch.zeros(0)
    for s in range(T):
        method.before_step(host, Step(s, T, 0.0))
        for rows in (2, 3):
            batch = tiny.batch("llama", rows)
            host.model(**batch).loss.backward()
            dense(**batch).loss.backward()
        method.after_backward(host, Step(s, T, 0.0))
        before = [w.detach().clone() for w in weights]
        late = _mask_and_cut(weights, masks, method, (3, 3, 2, 2)[s])
        ours.step()
        theirs.step()
        moved = torch.cat([(w - v).flatten() for w, v in zip(weights, before, strict=True)])
        ours.zero_grad()
        theirs.zero_grad()
    assert int(budget.spent) == B
    mask = torch.cat([m.flatten() for m in masks])
    assert budget.positions.sort().values.tolist() == mask.nonzero().view(-1).tolist()
    for (site, delta), w in zip(host.deltas(), weights, strict=True):
        W = delta.merged(site.weight, None)[0]
        torch.testing.assert_close(W, w, rtol=0, atol=1e-14)
    # the first step of an entry that came in the last: (1 - b1) / (1 - b1^4) / sqrt(...) times lr
    step = lr * 0.1 / (1 - 0.9**4) * math.sqrt((1 - 0.999**4) / 0.001)
    torch.testing.assert_close(
        moved[late].abs(), torch.full_like(moved[late], step), rtol=1e-3, atol=0
    )


@torch.no_grad()
def _mask_and_cut(weights: list[nn.Parameter], masks: list[Tensor], method: ID3, n: int) -> Tensor:
    """The reference: unmask the `n` best over all weights, zero the other gradients; returns the
    new positions.
    """
    w, g, mask = (
        torch.cat([t.flatten() for t in ts]) for ts in (weights, [w.grad for w in weights], masks)
    )
    H = g.abs() / (w.abs() + method.eps) ** method.exp
    new = torch.where(mask, -1.0, H).argsort(descending=True, stable=True)[:n]
    mask[new] = True
    for w, m, part in zip(weights, masks, mask.split([w.numel() for w in weights]), strict=True):
        m.copy_(part.view_as(m))
        w.grad.mul_(m)
    return new


def test_a_step_that_is_not_finite_unmasks_nothing() -> None:
    host, method, budget = adapted(budget=10)
    before = budget.positions.clone()
    method.before_step(host, Step(0, 5, 0.0))
    (host.model(**tiny.batch("llama")).loss * math.inf).backward()
    method.after_backward(host, Step(0, 5, 0.0))
    assert budget.values.grad.isnan().all()  # so that the loop takes no step
    assert (int(budget.spent), int(budget.step)) == (0, 0)
    assert torch.equal(budget.positions, before)


def test_a_target_without_part_in_the_loss_scores_zero() -> None:
    host, method, budget = adapted(budget=10, target_modules=("q", "embed"), max_steps=1)
    method.before_step(host, Step(0, 5, 0.0))
    embeds = host.model.get_input_embeddings().weight[tiny.batch("llama")["input_ids"]].detach()
    host.model(inputs_embeds=embeds, labels=tiny.batch("llama")["labels"]).loss.backward()
    method.after_backward(host, Step(0, 5, 0.0))
    (start, size) = next(
        (d.start, math.prod(d.shape)) for site, d in host.deltas() if site.role == "embed"
    )
    assert int(budget.spent) == 10
    assert not ((budget.positions >= start) & (budget.positions < start + size)).any()


def test_the_file_holds_the_budget_and_no_weights(make_loop: MakeLoop, tmp_path: Path) -> None:
    loop = make_loop(method=ID3(budget=20), lr=1e-3, max_steps=3)
    loop.fit()
    adapter.save(loop.host, "default", tmp_path, "causal_lm", "base")
    assert adapter.num_bytes(loop.host, "default") == 20 * (4 + 8) + 2 * 8
    again = Host(tiny.models()["llama"]())
    adapter.load(again, tmp_path)
    for model in (loop.host.model, again.model):
        model.eval()
    batch = tiny.batch("llama")
    with choice.using("reference", torch.device("cpu")):
        assert torch.equal(again.model(**batch).logits, loop.host.model(**batch).logits)


def test_a_run_stopped_between_choices_ends_bit_for_bit_the_same(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    options = {"max_steps": 8, "lr": 1e-3, "method": ID3(budget=5, exp=1.0)}
    straight = make_loop(folder=tmp_path / "straight", **options)
    straight.fit()
    paused = interrupted(make_loop, tmp_path / "paused", [1, 4, 6], **options)
    wanted = straight.host.state()
    assert all(torch.equal(t, wanted[n]) for n, t in paused.host.state().items())


def test_the_papers_budget_is_its_share_of_deberta() -> None:
    config = DebertaV2Config(
        vocab_size=128_100,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        type_vocab_size=0,
        relative_attention=True,
        position_buckets=256,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
    )
    host = Host(empty_model(config, "classification"))
    host.add(ID3(budget=320_000))
    trained, every = host.num_parameters()
    assert trained == 320_000
    assert round(100 * trained / (every - trained), 2) == 0.17


def test_budgets_that_do_not_fit_are_refused() -> None:
    host = Host(tiny.models()["llama"]())
    with pytest.raises(ConfigError, match="fewer than"):
        host.add(ID3(budget=10**6))
    with pytest.raises(NotApplicable, match="less than one"):
        host.add(ID3(density=1e-9))
    assert not host.adapters


# -- over the parameters of another method ---------------------------------------------------------
LORA: dict[str, Any] = {"over": "lora", "over_options": {"r": 2, "target_modules": ["q", "v"]}}


def of_the_adapter(host: Host) -> dict[str, Tensor]:
    return {n: p for n, p in host.trained().items() if is_own(n)}


@pytest.mark.parametrize("exp", [0.0, 1.0])
def test_over_lora_the_run_is_that_of_a_masked_adam_and_the_rest_stays(
    exp: float, make_loop: MakeLoop
) -> None:
    B, T, lr = 30, 4, 0.01
    options = {"lr": lr, "max_steps": T, "max_grad_norm": 100.0}
    loop = make_loop(method=ID3(budget=B, exp=exp, **LORA), **options)
    plain = make_loop(method=LoRA(r=2, target_modules=("q", "v")), **options)
    start = {n: p.detach().clone() for n, p in of_the_adapter(loop.host).items()}
    weights = list(of_the_adapter(plain.host).values())
    assert all(torch.equal(w, s) for w, s in zip(weights, start.values(), strict=True))
    masks = [torch.zeros_like(w, dtype=torch.bool) for w in weights]
    for group in plain.optimizer.param_groups:
        group["weight_decay"] = 0.0
    for s, n in enumerate((8, 8, 7, 7)):
        (share,) = plain.shares([plain.examples[i] for i in plain.plan.rows(plain.order(0), s)])
        plain.forward_backward([share], Totals.of([share.batch]))
        _mask_and_cut(weights, masks, ID3(exp=exp), n)
        plain.optimizer.step()
        plain.optimizer.zero_grad()
        plain.scheduler.step()
    loop.fit()
    for ours, w in zip(of_the_adapter(loop.host).values(), weights, strict=True):
        torch.testing.assert_close(ours, w, atol=1e-7, rtol=1e-5)
    changed = [ours != start[n] for n, ours in of_the_adapter(loop.host).items()]
    assert all(torch.equal(c, m) for c, m in zip(changed, masks, strict=True))
    assert sum(int(m.sum()) for m in masks) == B


def test_over_lora_what_is_published_is_a_plain_lora(make_loop: MakeLoop, tmp_path: Path) -> None:
    loop = make_loop(method=ID3(budget=20, **LORA), max_steps=3)
    loop.fit()
    adapter.save(loop.host, "default", tmp_path, "causal_lm", "base")
    assert adapter.read_config(tmp_path)["peft_type"] == "LORA"
    theirs = peft.PeftModel.from_pretrained(tiny.models()["llama"](), tmp_path).eval()
    batch = tiny.batch("llama")
    wanted = loop.host.model.eval()(**batch).logits
    torch.testing.assert_close(theirs(**batch).logits, wanted, atol=1e-6, rtol=1e-5)
    loop.host.remove("default")
    assert not any(map(is_own, loop.host.model.state_dict()))


@pytest.mark.parametrize(
    ("over", "options"),
    [("adalora", {"tinit": 1, "tfinal": 2, "init_r": 4, "target_r": 2}), ("compacter", {})],
)
def test_over_another_method_a_stopped_run_ends_the_same(
    over: str, options: dict[str, Any], make_loop: MakeLoop, tmp_path: Path
) -> None:
    made = {"max_steps": 6, "method": ID3(budget=50, over=over, over_options=options)}
    straight = make_loop(folder=tmp_path / "straight", **made)
    straight.fit()
    again = {**made, "method": ID3(budget=50, over=over, over_options=options)}
    paused = interrupted(make_loop, tmp_path / "paused", [2, 4], **again)
    wanted, state = straight.host.state(), paused.host.state()
    assert wanted.keys() == state.keys()
    assert all(torch.equal(t, wanted[n]) for n, t in state.items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"over": "loora"}, "no method 'loora'. Did you mean lora"),
        ({"over": "full"}, "it is selective"),
        (
            {"over": "lora", "over_options": {"rr": 2}},
            r"over_options, for method.over=lora: .*\brr\b",
        ),
        ({"over_options": {"r": 2}}, "that method.over names"),
        ({"budget": 10**5, **LORA}, "what method.over trains has 672 weights"),
    ],
)
def test_what_cannot_be_unmasked_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Host(tiny.models()["llama"]()).add(ID3(**fields))
