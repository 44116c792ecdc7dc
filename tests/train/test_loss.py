"""The loss is the sum over targets divided by their number, however the examples are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch

from peftcli.data.collate import (
    Batch,
    Choice,
    Example,
    causal_collator,
    make_collator,
    padded_rows,
    training_branches,
)
from peftcli.models.attention import NAME, can_pack, use_packed_attention
from peftcli.settings import Loss, Task
from peftcli.train import objective
from peftcli.train.evaluate import evaluate
from tests import tiny
from tests.train.conftest import MakeLoop, chats

LOG_4, UNLIKELY, LOG_2 = 1.386294, 0.274437, 0.693147  # -log 0.76 is the middle one


def trained_by(loop: object) -> dict[str, torch.Tensor]:
    loop.fit()
    return {n: p.detach().clone() for n, p in loop.host.trained().items()}


@pytest.mark.parametrize("kind", get_args(Loss))
def test_batch_8_times_1_equals_1_times_8(kind: Loss, make_loop: MakeLoop, tmp_path) -> None:
    wide = make_loop(folder=tmp_path / "a", loss=kind, per_device_train_batch_size=8, max_steps=4)
    narrow = make_loop(
        folder=tmp_path / "b",
        loss=kind,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        max_steps=4,
    )
    a, b = trained_by(wide), trained_by(narrow)
    losses = [[r["loss"] for r in loop.screen.records] for loop in (wide, narrow)]
    np.testing.assert_allclose(*losses, atol=1e-6, rtol=0)
    norms = [[r["grad_norm"] for r in loop.screen.records] for loop in (wide, narrow)]
    np.testing.assert_allclose(*norms, rtol=1e-4)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)


def test_packed_equals_padded_to_a_millionth(make_loop: MakeLoop, tmp_path) -> None:
    packed = make_loop(
        folder=tmp_path / "a", packing=True, max_steps=3, per_device_train_batch_size=6
    )
    padded = make_loop(
        folder=tmp_path / "b", packing=False, max_steps=3, per_device_train_batch_size=6
    )
    packed.fit(), padded.fit()
    losses = [[r["loss"] for r in loop.screen.records] for loop in (packed, padded)]
    np.testing.assert_allclose(*losses, atol=1e-6, rtol=0)
    assert all(
        a["tokens"] < b["tokens"]
        for a, b in zip(packed.screen.records, padded.screen.records, strict=True)
    )


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_loss_is_transformers_own(model: str) -> None:
    net, examples = tiny.models()[model](), chats(5)
    ids = torch.zeros(5, 24, dtype=torch.long)
    labels = torch.full((5, 24), -100)
    mask = torch.zeros(5, 24, dtype=torch.long)
    for i, e in enumerate(examples):
        n = len(e["input_ids"])
        ids[i, :n], mask[i, :n] = torch.from_numpy(e["input_ids"]), 1
        labels[i, :n][torch.from_numpy(e["supervised"])] = ids[i, :n][
            torch.from_numpy(e["supervised"])
        ]
    wanted = net(input_ids=ids, attention_mask=mask, labels=labels).loss
    for packing in (False, True):
        if packing:
            use_packed_attention(net)
        batch = causal_collator(0, packing)(examples)
        ours = objective.loss_sum("causal_lm", net, batch) / batch.num_targets
        torch.testing.assert_close(ours, wanted, atol=2e-6, rtol=1e-6)


def test_every_token_can_be_a_target_but_the_first() -> None:
    examples = chats(3)
    for e in examples:
        e["supervised"] = np.ones(len(e["input_ids"]), bool)
    net = tiny.models()["llama"]()
    use_packed_attention(net)
    packed = causal_collator(0, True)(examples)
    assert packed.num_targets == sum(len(e["input_ids"]) - 1 for e in examples)
    apart = sum(
        net(input_ids=_row(e), labels=_row(e)).loss * (len(e["input_ids"]) - 1) for e in examples
    )
    torch.testing.assert_close(
        objective.loss_sum("causal_lm", net, packed), apart, atol=1e-4, rtol=1e-6
    )


def _row(example: dict) -> torch.Tensor:
    return torch.from_numpy(example["input_ids"]).long()[None]


def test_a_shared_beginning_is_laid_once_and_changes_no_gradient() -> None:
    examples = chats(4)
    grads = []
    for share in (True, False):
        net = tiny.models()["llama"]()
        use_packed_attention(net)
        from peftcli.data.collate import packed_row

        batch = packed_row(training_branches(examples, share), tuple("abcd"))
        objective.loss_sum("causal_lm", net, batch).backward()
        grads.append({n: p.grad for n, p in net.named_parameters()})
        assert batch.num_tokens == sum(len(e["input_ids"]) - 2 for e in examples) - (
            4 * 3 if share else 0
        )
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-4)


def test_forgotten_boundaries_would_leak() -> None:
    """The probe of `can_pack` sees a model whose attention ignores the boundaries."""
    net = tiny.models()["llama"]()
    assert "does not go through sdpa" in can_pack(net, 64)
    use_packed_attention(net)
    assert net.config._attn_implementation == NAME
    assert can_pack(net, 64) is None
    for layer in net.model.layers:
        layer.self_attn.forward = _without_segments(layer.self_attn.forward)
    assert "change its logits" in can_pack(net, 64)


def _without_segments(forward: object) -> object:
    def leaking(*args: object, segments: object = None, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    return leaking


def test_the_three_losses_of_tfew() -> None:
    """Four words of equal logits; a right answer of two tokens, a wrong one of one token."""
    targets, owner = torch.tensor([1, 2, 1, 2, 3]), torch.tensor([0, 0, 1, 1, 2])
    counted = torch.tensor([True, True, False, False, False])
    batch = Batch(
        {}, targets, ("a",), 5, owner=owner, counted=counted, choices=(Choice((1, 2), 0),)
    )
    totals = objective.Totals.of([batch, batch])
    assert totals == objective.Totals(targets=4, wrong=2, questions=2)
    half = objective.tfew(torch.zeros(5, 4), batch, totals)
    assert 2 * half.item() == pytest.approx(LOG_4 + UNLIKELY + LOG_2, abs=1e-6)


def in_pairs(examples: Sequence[Example]) -> list[Example]:
    """The same for an encoder-decoder."""
    pairs = []
    for e in examples:
        P, given = e["prompt_length"], ("id", "choices", "answer")
        halves = {"input_ids": e["input_ids"][:P], "labels": e["input_ids"][P:]}
        pairs.append({**halves, **{k: e[k] for k in given}})
    return pairs


def with_an_earlier_answer(example: Example) -> Example:
    """An answer in the prompt too, and one in the first token, which nothing predicts."""
    marks = example["supervised"].copy()
    marks[[0, 2]] = True
    return {**example, "supervised": marks}


@pytest.mark.parametrize("kind", get_args(Loss))
@pytest.mark.parametrize("task", ["causal_lm", "seq2seq", "classification"])
@pytest.mark.parametrize("packing", [False, True])
def test_totals_ahead_are_those_of_the_batches(kind: Loss, task: Task, packing: bool) -> None:
    """Ranks count what others batch."""
    held: list[Example] = [with_an_earlier_answer(e) for e in chats(7)]
    if task == "seq2seq":
        held = in_pairs(held)
    if task == "classification":
        held = [{"id": e["id"], "input_ids": e["input_ids"], "label": 1} for e in held]
    collate = make_collator(task, packing=packing, scoring=kind == "tfew")
    batches = [collate(held[:4]), collate(held[4:])]
    totals = objective.Totals.ahead(held, kind)
    assert totals == objective.Totals.of(batches)
    assert (totals.questions > 0) == (kind == "tfew" and task != "classification")


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_scores_do_not_depend_on_batch_size_or_layout(model: str) -> None:
    examples = chats(17)
    results = []
    for packing, size in ((False, 1), (False, 5), (True, 1), (True, 7)):
        net = tiny.models()[model]()
        if packing:
            use_packed_attention(net)
        collate = causal_collator(0, packing, scoring=True)
        results.append(evaluate(net, "causal_lm", examples, examples.lengths, collate, size))
    for other in results[1:]:
        assert other == pytest.approx(results[0], abs=1e-5)
    assert set(results[0]) == {"loss", "perplexity", "accuracy", "f1", "mcc"}


def test_padding_is_masked_by_position_not_by_id() -> None:
    """Id 9 both pads and stands in the text: the loss of each row is that of the row alone."""
    examples, net = chats(3), tiny.models()["llama"]()
    together = padded_rows(training_branches(examples, False), tuple("abc"), pad=9)
    apart = [padded_rows(training_branches([e], False), ("x",), pad=9) for e in examples]
    sums = [objective.loss_sum("causal_lm", net, b) for b in apart]
    torch.testing.assert_close(objective.loss_sum("causal_lm", net, together), sum(sums))


def test_packing_is_tried_with_one_kernel_for_both_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("rounds otherwise than the other layout")

    net = tiny.models()["llama"]().bfloat16()
    use_packed_attention(net)
    monkeypatch.setattr("peftcli.models.attention.dense_attention", refuse)
    monkeypatch.setattr("peftcli.kernels.packed_attention.dense_attention", refuse)
    monkeypatch.setattr("peftcli.kernels.packed_attention.batched_attention", refuse)
    assert can_pack(net, 64) is None
