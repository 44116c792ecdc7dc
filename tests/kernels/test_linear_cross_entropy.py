"""The loss inside the head against the loss of all its logits, and where a model allows it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peftcli.data.collate import causal_collator
from peftcli.kernels import linear_cross_entropy as module
from peftcli.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from peftcli.models.attention import use_packed_attention
from peftcli.models.head import direct_head
from peftcli.train import objective
from tests import tiny
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
def test_value_and_gradient_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, rows: int, d: int, words: int, bias: bool
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
    assert torch.autograd.gradcheck(lambda h: f(h, W, b, targets), (h,))


f = linear_cross_entropy


def test_large_logits_stay_finite() -> None:
    h, W, b, targets = operands(6, 4, 9, torch.float32)
    loss = f(h, W * 1e4, b, targets)
    torch.testing.assert_close(loss, linear_cross_entropy_ref(h, W * 1e4, b, targets))
    loss.backward()
    assert h.grad is not None
    assert h.grad.isfinite().all()


def test_bfloat16_errs_no_more_than_the_plain_way() -> None:
    h, W, b, targets = operands(300, 64, 500, torch.float64)
    W = W / 8
    exact = torch.autograd.grad(linear_cross_entropy_ref(h, W, b, targets), h)[0]
    errors = []
    for way in (f, linear_cross_entropy_ref):
        half = h.detach().bfloat16().requires_grad_()
        loss = way(half, W.bfloat16(), b.bfloat16(), targets)
        assert loss.dtype == torch.float32
        errors.append((torch.autograd.grad(loss, half)[0].double() - exact).norm())
    assert errors[0] <= 1.1 * errors[1]


def test_a_head_that_is_trained_gets_its_gradient() -> None:
    h, W, b, targets = operands(5, 4, 9, torch.float32)
    W.requires_grad_()
    f(h, W, b, targets).backward()
    assert W.grad is not None


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
