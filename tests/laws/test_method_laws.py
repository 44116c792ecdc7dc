"""Laws: what every method keeps on every architecture. A new file in configs/method/ is under them
at once.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from peftcli.core.graft import fold, is_grafted, is_own
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.merge import folded
from peftcli.core.method import Method
from peftcli.errors import ConfigError, NotApplicable
from peftcli.export import adapter
from peftcli.kernels import choice
from tests import tiny

CONFIGS = Path(__file__).parents[2] / "configs" / "method"
METHODS = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
MODELS = sorted(tiny.models())
TASKS = {"llama": "causal_lm", "gpt2": "causal_lm", "bert": "classification", "t5": "seq2seq"}
TASKS |= {"vit": "image_classification"}
LOOKS = ("spt",)  # what cannot be set up without a look at the data
GENERATING = ("llama", "gpt2", "t5")
COMPILED = [(m, "llama") for m in METHODS] + [("lora", "gpt2")]  # seconds each
# options that are made for widths of thousands and drown, or do not fit, a model of width 32
TINY_SCALES: dict[str, dict[str, object]] = {
    "fourierft": {"scaling": 5.0},
    "qwha": {"scaling": 50.0},
    "spt": {"budget": 2000, "step": 100, "dropout": 0.0, "drop_path": 0.0, "batches": 2},
}


def make_method(name: str, **changes: object) -> Method:
    """The method as its YAML file has it."""
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    module, _, cls = config.pop("_target_").rpartition(".")
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
    return getattr(__import__(module, fromlist=[cls]), cls)(**{**fields, **changes})


def add(host: Host, method: str, model: str) -> None:
    """Set the method up; where it does not apply, the model is left as it was."""
    before = set(host.model.state_dict())
    try:
        made = make_method(method, **TINY_SCALES.get(method, {}))
        host.add(made, data=tiny.Look(host.model, model) if method in LOOKS else None)
    except NotApplicable as refusal:
        assert str(refusal).endswith("."), refusal  # noqa: PT017
        assert set(host.model.state_dict()) == before
        assert not host.trained()
        assert not host.adapters
        raise


def adapted(
    method: str,
    model: str,
    disturb: bool = True,
    new_modules: Sequence[str] = (),
    seed: int = 7,
    base: nn.Module | None = None,
) -> Host:
    """A tiny model under the method, or `base`, which is one; `disturb` moves the deltas off their
    start, so that they can be seen. Where the method does not apply the law has no more to say.
    """
    torch.manual_seed(seed)
    host = Host(base or tiny.models()[model](), new_modules)
    try:
        add(host, method, model)
    except NotApplicable as refusal:
        pytest.skip(f"refused: {refusal}")
    if disturb:
        move(host)
    return host


@lru_cache(4)
def refusal_or_host(method: str, model: str, disturb: bool) -> Host | str:
    try:
        return adapted(method, model, disturb)
    except pytest.skip.Exception as refused:
        return str(refused)


def looked_at(method: str, model: str, disturb: bool = True) -> Host:
    """As `adapted`, made once for all laws that leave it as it is."""
    host = refusal_or_host(method, model, disturb)
    if isinstance(host, str):
        pytest.skip(host)
    return host


@cache
def plain(model: str) -> nn.Module:
    """The tiny model alone, for looking at."""
    return tiny.models()[model]()


@torch.no_grad()
def move(host: Host) -> None:
    """Push everything that trains off its start; a wide matrix less, so that its product with an
    input moves as far as a narrow one's.
    """
    for p in host.trained().values():
        wide = max(1.0, p.shape[-1] / 64) if p.ndim >= 2 else 1.0
        p.add_(0.05 / wide**0.5 * torch.randn_like(p))


def logits(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return model(**tiny.batch(name)).logits


def backward(host: Host, name: str) -> dict[str, Tensor]:
    """Gradients of everything that trains, in training mode; dropout draws alike at every call."""
    torch.manual_seed(5)
    host.model.train()
    host.model.zero_grad()
    extra = {} if name in ("bert", "vit") else {"use_cache": False}
    host.model(**tiny.batch(name), **extra).loss.backward()
    host.model.eval()
    return {n: p.grad.clone() for n, p in host.trained().items() if p.grad is not None}


everywhere = pytest.mark.parametrize(  # scope: all laws about one pair run one after another
    ("method", "model"), [(m, a) for m in METHODS for a in MODELS], scope="module"
)


def with_deltas(host: Host) -> Host:
    """The host, where the method grafts deltas; a law about them has nothing to say of others."""
    if not host.sites["default"]:
        pytest.skip("trains the base's own weights")
    return host


def folds(host: Host) -> bool:
    """Whether the equation folds into the weights; else it says so."""
    try:
        folded(host.model)
    except ConfigError:
        with pytest.raises(ConfigError, match="not fold"):
            host.merge()
        assert host.active == tuple(host.adapters)
        return False
    return True


@everywhere
def test_a_method_that_promises_it_starts_at_the_base(method: str, model: str) -> None:
    host = looked_at(method, model, disturb=False)
    base = logits(plain(model), model)
    if not host.adapters["default"].starts_at_base:
        assert (logits(host.model, model) - base).abs().max() > 1e-8  # adapters start near it
        return
    torch.testing.assert_close(logits(host.model, model), base, atol=3e-6, rtol=1e-5)


@everywhere
def test_exactly_what_trains_gets_a_gradient(method: str, model: str) -> None:
    host = looked_at(method, model)
    grads = backward(host, model)
    assert grads.keys() == host.trained().keys() != set()
    assert all(p.grad is None for p in host.model.parameters() if not p.requires_grad)
    silent = [n for n, g in grads.items() if not g.abs().sum() > 0]
    # biases of k cancel in the softmax: their gradients are rounding, or nothing
    assert all(n.endswith("bias") or "pooler" in n for n in silent), silent


@everywhere
def test_base_weights_keep_their_names(method: str, model: str) -> None:
    host = looked_at(method, model)
    own = {n for n in host.model.state_dict() if not is_own(n)}
    assert own == set(plain(model).state_dict())


@everywhere
def test_gradients_equal_those_of_the_folded_weight_in_float64(method: str, model: str) -> None:
    host = with_deltas(adapted(method, model))
    if not folds(host):
        return
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


@everywhere
def test_merged_weights_give_the_same_output_and_unmerging_is_exact(
    method: str, model: str
) -> None:
    host = with_deltas(adapted(method, model))
    if not folds(host):
        return
    apart = logits(host.model, model)
    base = {n: p.clone() for n, p in host.model.named_parameters()}
    host.merge()
    torch.testing.assert_close(logits(host.model, model), apart, atol=1e-5, rtol=1e-5)
    host.unmerge()
    assert all(torch.equal(p, base[n]) for n, p in host.model.named_parameters())
    assert host.active == ("default",)


@everywhere
def test_state_survives_saving_and_loading(method: str, model: str) -> None:
    host = looked_at(method, model)
    saved = {n: t.clone() for n, t in host.state().items()}
    fresh = adapted(method, model, disturb=False)
    fresh.load_state(saved)
    assert all(torch.equal(t, saved[n]) for n, t in fresh.state().items())
    assert torch.equal(logits(fresh.model, model), logits(host.model, model))


@everywhere
def test_deltas_switch_off_and_on(method: str, model: str) -> None:
    host = with_deltas(looked_at(method, model))
    alone = tiny.models()[model]()
    with torch.no_grad():  # the base's own weights that train beside the deltas have no switch
        for name in host.selected:
            alone.get_parameter(name).copy_(host.model.get_parameter(name))
    on, base = logits(host.model, model), logits(alone, model)
    with host.disabled():
        torch.testing.assert_close(logits(host.model, model), base, atol=3e-6, rtol=1e-5)
    assert torch.equal(logits(host.model, model), on)
    assert (on - base).abs().max() > 1e-6


@everywhere
def test_two_adapters_stack_and_switch(method: str, model: str) -> None:
    host = with_deltas(adapted(method, model))
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
    if folds(host):
        host.merge()
        torch.testing.assert_close(logits(host.model, model), both, atol=1e-5, rtol=1e-5)
        host.unmerge()
    host.remove("second")
    assert torch.equal(logits(host.model, model), one)


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's advice on its own options
@everywhere
def test_stock_peft_computes_the_same_where_it_has_the_method(
    method: str, model: str, tmp_path: Path
) -> None:
    head = ["classifier"] if model == "bert" else []  # stock peft looks for it in the file
    seen = looked_at(method, model)
    made = seen.adapters["default"]
    if made.publishes_model or made.hf_refuses(seen, "default"):
        pytest.skip("not peft's")
    host = adapted(method, model, new_modules=head)
    made = host.adapters["default"]
    made.finish(host)
    adapter.save(host, "default", tmp_path, TASKS[model], "base")
    base = tiny.models()[model]()  # is_trainable: else peft's AdaLoRA lacks a name for its loss
    theirs = peft.PeftModel.from_pretrained(
        base, tmp_path, is_trainable=made.family != "prompt"
    ).eval()
    ours, stock = logits(host.model, model), logits(theirs, model)
    if ours.ndim == 3:  # peft also gives the logits of a prompt's own tokens
        stock = stock[:, -ours.shape[1] :]
    torch.testing.assert_close(stock, ours, atol=1e-5, rtol=1e-4)


@everywhere
def test_copies_and_pickles_compute_the_same(method: str, model: str) -> None:
    host = looked_at(method, model)
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
@pytest.mark.parametrize(("method", "model"), COMPILED)
def test_a_compiled_block_gives_the_same_gradients(method: str, model: str) -> None:
    with_deltas(looked_at(method, model))
    host = adapted(method, model)
    plain = backward(host, model)
    torch._dynamo.reset()
    last = host.model.get_submodule(host.layout.blocks[-1])
    last.compile(backend="aot_eager", fullgraph=True)
    for name, grad in backward(host, model).items():
        torch.testing.assert_close(grad, plain[name], atol=1e-5, rtol=1e-4)


@everywhere
def test_a_bfloat16_base_keeps_float32_deltas_and_nearly_the_same_gradients(
    method: str, model: str
) -> None:
    apart = rounded_apart(with_deltas(looked_at(method, model)), model)
    if (
        apart >= 0.1
    ):  # a draw may have a ReLU or a softmax at its edge: then the middle one of three
        others = [rounded_apart(adapted(method, model, seed=seed), model) for seed in (8, 9)]
        apart = sorted([apart, *others])[1]
    assert apart < 0.1


def rounded_apart(host: Host, model: str) -> float:
    """How far the gradients on a bfloat16 base are from those on a float32 one, relatively."""
    exact = backward(host, model)
    torch.manual_seed(7)
    half = Host(tiny.models()[model]().bfloat16())
    half.add(host.adapters["default"].published(host, "default"))
    half.load_state(host.state())
    assert all(p.dtype == torch.float32 for p in half.trained().values())
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tiny.batch(model).items()}
    torch.manual_seed(5)  # the draws of `backward`
    half.model.train()
    with torch.autocast("cpu", torch.bfloat16):
        half.model(**batch).loss.backward()
    flat = torch.cat([p.grad.flatten() for p in half.trained().values()])
    wanted = torch.cat([g.flatten() for g in exact.values()])
    return float((flat - wanted).norm() / wanted.norm())


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, at every 8-bit product
@pytest.mark.parametrize("kind", ["nf4", "int8", "gptq"])
@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_base_trains_the_deltas_or_is_refused(method: str, kind: str) -> None:
    torch.manual_seed(7)
    host = Host(tiny.quantised(tiny.models()["llama"](), kind))
    base = logits(host.model, "llama")
    if not make_method(method).on_quantised:
        with pytest.raises(ConfigError, match=r"few bits|quantised"):
            host.add(make_method(method))
        return
    try:
        add(host, method, "llama")
    except NotApplicable as refusal:
        pytest.skip(f"refused: {refusal}")
    if make_method(method).starts_at_base:
        # the 8-bit product rounds its inputs too, that of a changed weight does not
        atol = 1e-2 if kind == "int8" else 1e-3
        torch.testing.assert_close(logits(host.model, "llama"), base, atol=atol, rtol=1e-2)
    move(host)
    grads = backward(host, "llama")
    assert grads.keys() == host.trained().keys() != set()
    assert all(g.isfinite().all() for g in grads.values())
    with pytest.raises(ConfigError, match=r"\d bits|does not fold"):
        host.merge()


@everywhere
def test_a_published_adapter_is_read_back_whole(method: str, model: str, tmp_path: Path) -> None:
    host = adapted(method, model)
    made = host.adapters["default"]
    if made.publishes_model:
        return
    made.finish(host)
    adapter.save(host, "default", tmp_path, TASKS[model], "base")
    torch.manual_seed(8)
    again = Host(tiny.models()[model]())
    adapter.load(again, tmp_path, "another")
    torch.testing.assert_close(
        logits(again.model, model), logits(host.model, model), atol=1e-5, rtol=1e-5
    )


@everywhere
def test_the_bare_base_reloads_whole(method: str, model: str, tmp_path: Path) -> None:
    host = looked_at(method, model)
    with host.bare() as base:
        base.save_pretrained(tmp_path)
    cls: Any = type(plain(model))
    again, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.architectures == [type(again).__name__]
    with host.disabled(), choice.using("reference", torch.device("cpu")):
        assert torch.equal(logits(again.eval(), model), logits(host.model, model))


@pytest.mark.parametrize("model", GENERATING)
@pytest.mark.parametrize("method", METHODS)
def test_generation_with_a_cache_equals_generation_without(method: str, model: str) -> None:
    host = looked_at(method, model)
    x = {k: v for k, v in tiny.batch(model).items() if k != "labels"}
    if model != "t5":
        x["attention_mask"] = x["attention_mask"].clone()
        x["attention_mask"][0, :3] = 0  # left padding
    with_cache, without = (
        host.model.generate(**x, max_new_tokens=4, do_sample=False, use_cache=c)
        for c in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("method", METHODS)
def test_the_yaml_file_equals_the_dataclass(method: str) -> None:
    written = make_method(method)
    assert written == type(written)()
    assert {k for k in OmegaConf.load(CONFIGS / f"{method}.yaml")} == {"_target_", *vars(written)}
