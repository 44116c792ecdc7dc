"""The loss inside the head against the loss of all its logits, and where a model allows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peftcli.core.host import Host
from peftcli.data.collate import causal_collator
from peftcli.kernels import linear_cross_entropy as module
from peftcli.kernels.linear_cross_entropy import (
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_ref,
)
from peftcli.models.attention import use_packed_attention
from peftcli.models.head import direct_head
from peftcli.train import objective
from tests import tiny
from tests.laws.test_method_laws import make_method
from tests.train.conftest import chats


def operands(rows: int, d: int, words: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(5)
    h, W, b = (
        torch.randn(size, generator=draw, dtype=torch.float64).to(dtype)
        for size in ((rows, d), (words, d), (words,))
    )
    return h.requires_grad_(), W, b, torch.randint(words, (rows,), generator=draw)


@pytest.mark.parametrize(("rows", "d", "words"), [(1, 3, 2), (7, 5, 11), (9, 6, 40)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", ["h", "W", "hWb", "b"])
def test_value_and_gradients_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, rows: int, d: int, words: int, bias: bool, trained: str
) -> None:
    monkeypatch.setattr(module, "BLOCK_ROWS", 4)
    h, W, b, targets = operands(rows, d, words, torch.float64)
    b = b if bias else None
    ours, wanted = f(h, W, b, targets), linear_cross_entropy_ref(h, W, b, targets)
    # the reference takes its loss in float32
    torch.testing.assert_close(
        ours,
        nn.functional.cross_entropy(h @ W.T + (0 if b is None else b), targets, reduction="sum"),
    )
    torch.testing.assert_close(ours.float(), wanted)
    tensors = {"h": h, "W": W, "b": b}
    for name, t in tensors.items():
        if t is not None:
            t.requires_grad_(name in trained)
    if any(t is not None and t.requires_grad for t in tensors.values()):
        assert torch.autograd.gradcheck(lambda *t: f(*t, targets), tuple(tensors.values()))


f = linear_cross_entropy


def test_large_logits_stay_finite() -> None:
    h, W, b, targets = operands(6, 4, 9, torch.float32)
    loss = f(h, W * 1e4, b, targets)
    torch.testing.assert_close(loss, linear_cross_entropy_ref(h, W * 1e4, b, targets))
    loss.backward()
    assert h.grad is not None
    assert h.grad.isfinite().all()


@pytest.mark.parametrize("trained", [False, True])
def test_bfloat16_errs_no_more_than_the_plain_way(trained: bool) -> None:
    h, W, b, targets = operands(300, 64, 500, torch.float64)
    tensors = (h, (W / 8).requires_grad_(trained), b.requires_grad_(trained))

    def gradients(way: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
        loss = way(*tensors, targets)
        assert loss.dtype == torch.promote_types(tensors[0].dtype, torch.float32)
        return list(torch.autograd.grad(loss, [t for t in tensors if t.requires_grad]))

    half = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in tensors]
    exact = torch.autograd.grad(
        nn.functional.cross_entropy(tensors[0] @ tensors[1].T + b, targets, reduction="sum"),
        [t for t in tensors if t.requires_grad],
    )
    for ours, plain, right in zip(
        gradients(f, half), gradients(linear_cross_entropy_ref, half), exact, strict=True
    ):
        assert (ours.double() - right).norm() <= 1.1 * (plain.double() - right).norm()


@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("packing", [True, False])
def test_a_model_trains_on_the_same_loss_and_gradients(model: str, packing: bool) -> None:
    net, examples = tiny.models()[model](), chats(5)
    for e in examples:
        e["supervised"] = np.ones(len(e["input_ids"]), bool)
    if packing:
        use_packed_attention(net)
    head = direct_head(net)
    assert head is not None
    head.weight.requires_grad_(False)
    batch = causal_collator(0, packing)(examples)
    results = []
    for given in (head, None):
        net.zero_grad()
        loss = objective.loss_sum("causal_lm", net, batch, given)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-6)
    assert results[0][1].keys() == results[1][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt_tuning", {}),
        ("p_tuning", {}),
        ("hf_peft", {"peft_type": "PROMPT_TUNING", "config": {"num_virtual_tokens": 3}}),
    ],
)
def test_rows_with_tokens_laid_before_them_have_the_same_loss(
    method: str, options: dict[str, object]
) -> None:
    host = Host(tiny.models()["llama"]())
    head = direct_head(host.model)
    host.add(make_method(method, **options))
    batch = causal_collator(0, packing=False)(chats(5))
    results = []
    for given in (head, None):
        host.model.zero_grad()
        loss = objective.loss_sum("causal_lm", host.model, batch, given)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in host.trained().values())])
        assert all(t is not None for t in results[-1])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


def test_a_model_that_changes_its_logits_after_the_head_is_noticed() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    assert direct_head(Gemma2ForCausalLM(config)) is None
    assert direct_head(tiny.models()["t5"]()) is not None
    assert direct_head(tiny.models()["bert"]()) is None


@pytest.mark.parametrize(("rows", "words"), [(1, 2), (7, 11), (40, 5)])
def test_the_loss_of_logits_that_are_there(rows: int, words: int) -> None:
    z = torch.randn(rows, words, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(words, (rows,))
    torch.testing.assert_close(
        cross_entropy(z, targets), nn.functional.cross_entropy(z, targets, reduction="sum")
    )
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets), (z,))
    with torch.no_grad():
        wanted = linear_cross_entropy_ref(z, torch.eye(words, dtype=torch.float64), None, targets)
        torch.testing.assert_close(cross_entropy(z, targets), wanted)
