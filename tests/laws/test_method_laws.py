"""Laws: what every method keeps on every architecture. A new file in configs/method/ is under them
at once.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from peftcli.core.graft import fold, is_grafted
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.method import Method
from tests import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "method"
METHODS = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
MODELS = sorted(tiny.models())
GENERATING = ("llama", "gpt2", "t5")


def make_method(name: str, **changes: object) -> Method:
    """The method as its YAML file has it."""
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    module, _, cls = config.pop("_target_").rpartition(".")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    return getattr(__import__(module, fromlist=[cls]), cls)(**{**fields, **changes})


def adapted(method: str, model: str, disturb: bool = True) -> Host:
    """A tiny model under the method; `disturb` moves the deltas off their start, so that they can
    be seen.
    """
    torch.manual_seed(7)
    host = Host(tiny.models()[model]())
    host.add(make_method(method))
    if disturb:
        with torch.no_grad():
            for p in host.trained().values():
                p.add_(0.05 * torch.randn_like(p))
    return host


def logits(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return model(**tiny.batch(name)).logits


def backward(host: Host, name: str) -> dict[str, Tensor]:
    """Gradients of everything that trains, in training mode."""
    host.model.train()
    host.model.zero_grad()
    extra = {} if name in ("bert", "vit") else {"use_cache": False}
    host.model(**tiny.batch(name), **extra).loss.backward()
    host.model.eval()
    return {n: p.grad.clone() for n, p in host.trained().items() if p.grad is not None}


everywhere = pytest.mark.parametrize(("method", "model"), [(m, a) for m in METHODS for a in MODELS])
with_deltas = pytest.mark.parametrize(
    ("method", "model"), [(m, a) for m in METHODS if not make_method(m).trains_base for a in MODELS]
)


@everywhere
def test_a_method_that_promises_it_starts_at_the_base(method: str, model: str) -> None:
    host = adapted(method, model, disturb=False)
    base = logits(tiny.models()[model](), model)
    assert host.adapters["default"].starts_at_base
    torch.testing.assert_close(logits(host.model, model), base, atol=3e-6, rtol=1e-5)


@everywhere
def test_exactly_what_trains_gets_a_gradient(method: str, model: str) -> None:
    host = adapted(method, model)
    grads = backward(host, model)
    assert grads.keys() == host.trained().keys() != set()
    assert all(p.grad is None for p in host.model.parameters() if not p.requires_grad)
    silent = [n for n, g in grads.items() if not g.abs().sum() > 0]
    # biases of k cancel in the softmax: their gradients are rounding, or nothing
    assert all(n.endswith("bias") or "pooler" in n for n in silent), silent


@everywhere
def test_base_weights_keep_their_names(method: str, model: str) -> None:
    host = adapted(method, model)
    own = {n for n in host.model.state_dict() if ".deltas." not in n}
    assert own == set(tiny.models()[model]().state_dict())


@with_deltas
def test_gradients_equal_those_of_the_folded_weight_in_float64(method: str, model: str) -> None:
    host = adapted(method, model)
    host.model.double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny.batch(model).items()}
    host.model(**batch).loss.backward()
    by_method = {n: p.grad.clone() for n, p in host.trained().items()}
    host.model.zero_grad()
    for module in [m for m in host.model.modules() if is_grafted(m)]:
        module.forward = _dense_forward(module)
    host.model(**batch).loss.backward()
    for name, parameter in host.trained().items():
        torch.testing.assert_close(by_method[name], parameter.grad, atol=1e-11, rtol=1e-9)


def _dense_forward(module: nn.Module) -> object:
    def forward(x: Tensor) -> Tensor:
        layer = fold(Bare(module, type(module).graft_of), module)
        return layer.linear(x, layer.weight, layer.bias)

    return forward


@with_deltas
def test_merged_weights_give_the_same_output_and_unmerging_is_exact(
    method: str, model: str
) -> None:
    host = adapted(method, model)
    apart = logits(host.model, model)
    base = {n: p.clone() for n, p in host.model.named_parameters()}
    host.merge()
    torch.testing.assert_close(logits(host.model, model), apart, atol=1e-5, rtol=1e-5)
    host.unmerge()
    assert all(torch.equal(p, base[n]) for n, p in host.model.named_parameters())
    assert host.active == ("default",)


@everywhere
def test_state_survives_saving_and_loading(method: str, model: str) -> None:
    host = adapted(method, model)
    saved = {n: t.clone() for n, t in host.state().items()}
    fresh = adapted(method, model, disturb=False)
    fresh.load_state(saved)
    assert all(torch.equal(t, saved[n]) for n, t in fresh.state().items())
    assert torch.equal(logits(fresh.model, model), logits(host.model, model))


@with_deltas
def test_deltas_switch_off_and_on(method: str, model: str) -> None:
    host = adapted(method, model)
    on, base = logits(host.model, model), logits(tiny.models()[model](), model)
    with host.disabled():
        torch.testing.assert_close(logits(host.model, model), base, atol=3e-6, rtol=1e-5)
    assert torch.equal(logits(host.model, model), on)
    assert (on - base).abs().max() > 1e-4


@with_deltas
def test_two_adapters_stack_and_switch(method: str, model: str) -> None:
    host = adapted(method, model)
    one = logits(host.model, model)
    host.add(make_method("lora", target_modules="all-linear"), "second")
    with torch.no_grad():
        for _, delta in host.deltas("second"):
            delta.B.normal_(std=0.05)
    both = logits(host.model, model)
    host.activate("default")
    assert torch.equal(logits(host.model, model), one)
    host.activate("second")
    assert not torch.equal(logits(host.model, model), both)
    host.activate("default", "second")
    assert torch.equal(logits(host.model, model), both)
    host.merge()
    torch.testing.assert_close(logits(host.model, model), both, atol=1e-5, rtol=1e-5)
    host.unmerge()
    host.remove("second")
    assert torch.equal(logits(host.model, model), one)


@everywhere
def test_copies_and_pickles_compute_the_same(method: str, model: str) -> None:
    host = adapted(method, model)
    y = logits(host.model, model)
    assert torch.equal(logits(copy.deepcopy(host.model), model), y)
    assert torch.equal(logits(pickle.loads(pickle.dumps(host.model)), model), y)


@everywhere
def test_gradient_checkpointing_gives_the_same_gradients(method: str, model: str) -> None:
    host = adapted(method, model)
    plain = backward(host, model)
    host.recompute_activations()
    for name, grad in backward(host, model).items():
        torch.testing.assert_close(grad, plain[name], atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings break it when they are errors
@everywhere
def test_compiled_blocks_give_the_same_gradients(method: str, model: str) -> None:
    host = adapted(method, model)
    plain = backward(host, model)
    torch._dynamo.reset()
    for path in host.layout.blocks:
        host.model.get_submodule(path).compile(backend="aot_eager", fullgraph=True)
    for name, grad in backward(host, model).items():
        torch.testing.assert_close(grad, plain[name], atol=1e-5, rtol=1e-4)


@with_deltas
def test_a_bfloat16_base_keeps_float32_deltas_and_nearly_the_same_gradients(
    method: str, model: str
) -> None:
    host = adapted(method, model)
    exact = backward(host, model)
    torch.manual_seed(7)
    half = Host(tiny.models()[model]().bfloat16())
    half.add(make_method(method))
    half.load_state(host.state())
    assert all(p.dtype == torch.float32 for p in half.trained().values())
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny.batch(model).items()}
    with torch.autocast("cpu", torch.bfloat16):
        half.model(**batch).loss.backward()
    flat = torch.cat([p.grad.flatten() for p in half.trained().values()])
    wanted = torch.cat([g.flatten() for g in exact.values()])
    assert (flat - wanted).norm() / wanted.norm() < 0.1


@everywhere
def test_the_bare_base_reloads_whole(method: str, model: str, tmp_path: Path) -> None:
    host = adapted(method, model)
    with host.bare() as base:
        base.save_pretrained(tmp_path)
    cls: Any = type(tiny.models()[model]())
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.architectures == [type(again).__name__]
    with host.disabled():
        assert torch.equal(logits(again.eval(), model), logits(host.model, model))


@pytest.mark.parametrize("model", GENERATING)
@pytest.mark.parametrize("method", METHODS)
def test_generation_with_a_cache_equals_generation_without(method: str, model: str) -> None:
    host = adapted(method, model)
    x = {k: v for k, v in tiny.batch(model).items() if k != "labels"}
    if model != "t5":
        x["attention_mask"] = x["attention_mask"].clone()
        x["attention_mask"][0, :3] = 0  # left padding
    with_cache, without = (
        host.model.generate(**x, max_new_tokens=6, do_sample=False, use_cache=c)
        for c in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("method", METHODS)
def test_the_yaml_file_equals_the_dataclass(method: str) -> None:
    written = make_method(method)
    assert written == type(written)()
    assert {k for k in OmegaConf.load(CONFIGS / f"{method}.yaml")} == {"_target_", *vars(written)}
