"""Linears that read one input are computed together, and nobody can tell."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from peftcli.core.graft import deltas_of
from peftcli.core.host import Host
from peftcli.core.siblings import Siblings
from peftcli.methods.lora import LoRA, LoRADelta
from tests import tiny

FAMILIES = {"llama": 6, "bert": 2, "t5": 6, "vit": 2, "gpt2": 0}  # of the tiny models


def adapted(model: str, **options: Any) -> Host:
    torch.manual_seed(0)
    host = Host(tiny.models()[model]().double())
    host.add(LoRA(r=3, target_modules="all-linear", **options))
    with torch.no_grad():
        for parameter in host.trained().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return host


def deltas(host: Host) -> list[LoRADelta]:
    return [delta for _, delta in host.deltas("default") if isinstance(delta, LoRADelta)]


def families(host: Host) -> set[Siblings]:
    return {delta.siblings for delta in deltas(host) if delta.siblings}


def logits_and_gradients(host: Host, model: str) -> list[Tensor]:
    logits = host.model(**tiny.batch(model)).logits
    return [logits, *torch.autograd.grad(logits.square().sum(), list(host.trained().values()))]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Siblings]:
    """The families that were computed together, as it happens."""
    seen: list[Siblings] = []
    output = Siblings.output

    def watched(self: Siblings, x: Tensor, place: int) -> Tensor | None:
        is_first = not self.waiting
        y = output(self, x, place)
        if is_first and y is not None:
            seen.append(self)
        return y

    monkeypatch.setattr(Siblings, "output", watched)
    return seen


@pytest.mark.parametrize("model", FAMILIES)
def test_together_equals_apart(model: str, computed: list[Siblings]) -> None:
    host = adapted(model)
    together = logits_and_gradients(host, model)
    assert len(computed) == len(set(computed)) == len(families(host)) == FAMILIES[model]
    for family in families(host):
        assert not family.are_apart
        assert not family.waiting
        family.are_apart = True
    for a, b in zip(together, logits_and_gradients(host, model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert len(computed) == FAMILIES[model]


def test_dropout_acts_on_each_alone_while_training(computed: list[Siblings]) -> None:
    host = adapted("llama", dropout=0.5)
    still = _run(host)
    assert torch.equal(_run(host), still)
    host.model.train()
    torch.manual_seed(0)
    assert not torch.allclose(_run(host), still)
    assert len(computed) == 18


def _run(host: Host) -> Tensor:
    return host.model(**tiny.batch("llama")).logits.detach()


def test_what_sits_on_one_of_them_takes_them_apart(computed: list[Siblings]) -> None:
    """A second adapter on q alone, and a switched off adapter."""
    host = adapted("llama")
    host.add(LoRA(r=2, target_modules=("q",)), "other")
    host.model(**tiny.batch("llama"))
    assert len(computed) == 3  # gate and up of the three blocks
    host.activate("default")
    host.model(**tiny.batch("llama"))
    assert len(computed) == 9
    host.activate()
    host.model(**tiny.batch("llama"))
    assert len(computed) == 9


def test_linears_that_are_called_with_different_inputs_part(computed: list[Siblings]) -> None:
    host = adapted("llama")
    model: Any = host.model
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_forward_pre_hook(lambda module, args: (args[0] + 1.0,))
    first = logits_and_gradients(host, "llama")
    assert sum(family.are_apart for family in families(host)) == 3
    again = logits_and_gradients(host, "llama")
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_a_copy_has_families_of_its_own() -> None:
    host = adapted("llama")
    twin = copy.deepcopy(host.model)
    q, q_twin = (model.model.layers[0].self_attn.q_proj for model in (host.model, twin))
    mine, other = (deltas_of(module)["default"].siblings for module in (q, q_twin))
    assert mine is not other
    assert other.members[0][0] is q_twin
