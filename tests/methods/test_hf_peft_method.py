"""The bridge: every tuner of the installed peft trains, is saved and loads in stock peft with the
same logits, or says why it cannot.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.core.method import Step
from peftcli.errors import ConfigError, NotApplicable
from peftcli.export import adapter
from peftcli.methods.bridge.as_built import as_built
from peftcli.methods.bridge.fields import PROMPTS, REFUSED
from peftcli.methods.hf_peft import HFPeft
from tests import tiny
from tests.conftest import Cli
from tests.train import conftest
from tests.train.conftest import MakeLoop, interrupted

pytestmark = pytest.mark.filterwarnings("ignore")  # peft's advice on its own options
make_loop = conftest.make_loop  # the fixture

TYPES = [kind.value for kind in peft.PeftType]
NEEDS = {"ADAMSS": ("sklearn", "scikit-learn")}  # modules that are not installed with peft
MISSING = {kind: name for kind, (module, name) in NEEDS.items() if find_spec(module) is None}
# What fits a model of width 32, where peft's own defaults do not.
OPTIONS: dict[str, dict[str, Any]] = {
    "FOURIERFT": {"n_frequency": 50},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "C3A": {"block_size": 8},
    "WAVEFT": {"n_frequency": 50},
    "PSOFT": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5, 6, 7, 8]},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    **{kind: {"num_virtual_tokens": 3} for kind in PROMPTS},
}
# Those whose change folds into the weights; the others keep to themselves.
APART = {"ADAPTION_PROMPT", "LILY", "LN_TUNING", "TRAINABLE_TOKENS", *PROMPTS}
REACHED = [kind for kind in TYPES if kind not in REFUSED and kind not in MISSING]
# scope: the tests of one tuner run one after another
each_tuner = pytest.mark.parametrize("kind", REACHED, scope="module")


def bridge(kind: str, **config: Any) -> HFPeft:
    return HFPeft(peft_type=kind, config={**OPTIONS.get(kind, {}), **config})


def adapted(kind: str, model: str = "llama") -> Host:
    torch.manual_seed(3)
    host = Host(tiny.models()[model]())
    host.add(bridge(kind))
    return host


def moved(host: Host) -> Host:
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.05 * torch.randn_like(p))
    return host


@lru_cache(1)
def looked_at(kind: str) -> Host:
    """A moved one for the tests that leave it as it is."""
    return moved(adapted(kind))


def logits(model: nn.Module, name: str = "llama") -> Tensor:
    inputs = {k: v for k, v in tiny.batch(name).items() if k != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_every_tuner_of_the_installed_peft_is_reached_or_refused() -> None:
    assert len(TYPES) >= 44
    assert set(REFUSED) < set(TYPES)
    assert len(REACHED) == len(TYPES) - len(REFUSED) - len(MISSING) >= 38


@each_tuner
def test_a_tuner_trains_beside_a_base_that_stays_as_it_was(kind: str) -> None:
    host = adapted(kind)
    batch = {k: v for k, v in tiny.batch("llama").items()}
    optimizer = torch.optim.Adam(host.trained().values(), lr=1e-2)
    host.model.train()
    losses = []
    for _ in range(6):
        rows = host.model(**batch, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(rows.flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state, base = host.model.state_dict(), tiny.llama().state_dict()
    assert {n for n in state if not is_own(n)} == set(base)
    assert all(torch.equal(state[n], base[n]) for n in base)


@each_tuner
def test_a_tuner_s_adapter_loads_in_stock_peft_and_here(kind: str, tmp_path: Path) -> None:
    host = looked_at(kind)
    ours = logits(host.model)
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    stock = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(logits(stock)[:, -ours.shape[1] :], ours, atol=1e-6, rtol=1e-5)
    again = Host(tiny.llama())
    adapter.load(again, tmp_path, "another")
    torch.testing.assert_close(logits(again.model), ours, atol=1e-6, rtol=1e-5)


@each_tuner
def test_a_tuner_folds_where_its_change_is_one_of_weights(kind: str) -> None:
    host = looked_at(kind)
    apart = logits(host.model)
    if kind in APART:
        with pytest.raises(ConfigError, match=r"does not fold|not linear|shares its weight"):
            host.merge()
        return
    host.merge()
    torch.testing.assert_close(logits(host.model), apart, atol=2e-6, rtol=1e-5)
    host.unmerge()
    assert torch.equal(logits(host.model), apart)


@each_tuner
def test_a_tuner_s_state_is_all_that_a_restart_needs(kind: str) -> None:
    host = looked_at(kind)
    again = adapted(kind)
    again.load_state({n: t.clone() for n, t in host.state().items()})
    assert torch.equal(logits(again.model), logits(host.model))


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_tuner_that_cannot_train_here_says_why(kind: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED[kind].split(";")[0]):
        HFPeft(peft_type=kind)


@pytest.mark.parametrize("kind", MISSING)
def test_a_tuner_that_needs_another_package_names_it(kind: str) -> None:
    with pytest.raises(ConfigError, match=MISSING[kind]):
        adapted(kind)


# -- What is asked for -----------------------------------------------------------------------------
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a type": ({"peft_type": "LORAA"}, "no such tuner. Did you mean LORA"),
    "a field": (
        {"peft_type": "LOHA", "config": {"aplha": 3}},
        r"method.config.aplha: peft's LOHA has no such field. Did you mean alpha",
    ),
    "a number": ({"config": {"r": "many"}}, r"method.config.r='many': takes a whole number"),
    "a choice": ({"config": {"bias": "some"}}, "takes none . all . lora_only"),
    "a list": ({"config": {"target_modules": 3}}, "takes a list of text . text . null"),
    "peft's own range": ({"config": {"r": 0}}, "should be a positive integer"),
    "ours": ({"config": {"modules_to_save": ["x"]}}, "method.modules_to_save"),
    "outside of wrappers": ({"config": {"alora_invocation_tokens": [3]}}, "cannot be used here"),
    "a loss of its own": ({"config": {"monteclora_config": {}}}, "its loss is added outside"),
    "a changed base": ({"config": {"init_lora_weights": "pissa"}}, "method=lora"),
    "targets twice": (
        {"config": {"target_modules": ["q_proj"]}, "target_modules": ("q",)},
        "give one of them",
    ),
    "targets of a prompt": (
        {"peft_type": "PREFIX_TUNING", "target_modules": "q"},
        "peft's PREFIX_TUNING has none",
    ),
    "a prompt's length": ({"peft_type": "P_TUNING"}, "num_virtual_tokens has no value"),
    "two at once": ({"config": {"rr": 1, "lora_dropot": 0.1}}, r"(?s)rr.*lora_dropout"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_peft_does_not_take_is_told_in_one_message(case: str) -> None:
    fields, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        Host(tiny.llama()).add(HFPeft(**fields))


def test_the_command_line_tells_it_before_anything_is_loaded(cli: Cli) -> None:
    said = cli("method=hf_peft", "method.peft_type=LOHA", "method.config.aplha=3", code=2).stderr
    assert said.startswith("error: method.config.aplha: peft's LOHA has no such field.")
    said = cli("method=hf_peft", "method.config={r: x}", code=2).stderr
    assert "method.config.r='x': takes a whole number." in said


def test_without_peft_the_message_is_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'peftcli\[peft\]'"):
        HFPeft()


def test_a_refusal_of_peft_s_leaves_the_model_as_it_was() -> None:
    host = Host(tiny.llama())
    with pytest.raises(ConfigError, match="must be divisible by `vector_length` 256"):
        host.add(HFPeft(peft_type="VBLORA"))
    assert set(host.model.state_dict()) == set(tiny.llama().state_dict())
    host.add(bridge("LOHA"))


def test_our_target_language_reaches_peft() -> None:
    host = Host(tiny.models()["vit"]())
    with pytest.raises(NotApplicable, match=r"ViTForImageClassification; name them"):
        host.add(HFPeft())
    host.add(HFPeft(target_modules="all-linear", config={"r": 2}))
    lora = Host(tiny.models()["vit"]())
    from peftcli.methods.lora import LoRA

    lora.add(LoRA(target_modules="all-linear", r=2))
    assert host.num_parameters() == lora.num_parameters()
    assert [s.path for s in host.sites["default"]] == [s.path for s in lora.sites["default"]]


def test_lora_with_weight_decomposition_crosses_both_ways(tmp_path: Path) -> None:
    host = Host(tiny.llama())
    host.add(bridge("LORA", use_dora=True, r=4, bias="all"))
    moved(host)
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    stock = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(logits(stock), logits(host.model), atol=1e-6, rtol=1e-5)
    again = Host(tiny.llama())
    adapter.load(again, tmp_path)
    torch.testing.assert_close(logits(again.model), logits(host.model), atol=1e-6, rtol=1e-5)


def test_biases_that_peft_trains_are_selected_and_saved(tmp_path: Path) -> None:
    host = Host(tiny.models()["gpt2"]())
    host.add(HFPeft(config={"bias": "lora_only"}))
    assert {n.rpartition(".")[2] for n in host.selected} == {"bias"}
    moved(host)
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    stock = peft.PeftModel.from_pretrained(tiny.gpt2(), tmp_path)
    torch.testing.assert_close(
        logits(stock, "gpt2"), logits(host.model, "gpt2"), atol=1e-6, rtol=1e-5
    )


# -- Prompts ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", PROMPTS)
def test_a_prompt_stays_in_the_cache_of_generation(kind: str) -> None:
    host = moved(adapted(kind))
    x = {k: v for k, v in tiny.batch("llama").items() if k != "labels"}
    x["attention_mask"][0, :3] = 0  # left padding
    with_cache, without = (
        host.model.generate(**x, max_new_tokens=6, do_sample=False, use_cache=c)
        for c in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_a_prompt_before_a_classifier_s_text_is_peft_s(kind: str, tmp_path: Path) -> None:
    host = moved(adapted(kind, "bert"))
    adapter.save(host, "default", tmp_path, "classification", "base")
    stock = peft.PeftModel.from_pretrained(tiny.bert(), tmp_path)
    torch.testing.assert_close(logits(stock, "bert"), logits(host.model, "bert"))


def test_a_prompt_before_an_encoder_and_decoder_is_refused() -> None:
    host = Host(tiny.t5())
    with pytest.raises(NotApplicable, match="T5ForConditionalGeneration"):
        host.add(bridge("PROMPT_TUNING"))
    assert not any(map(is_own, host.model.state_dict()))


# -- AdaLoRA's schedule ----------------------------------------------------------------------------
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 3, "deltaT": 2, "beta1": 0.5}
STEPS = 12


def peft_s_own_training() -> nn.Module:
    torch.manual_seed(3)
    config = peft.AdaLoraConfig(total_step=STEPS, task_type="CAUSAL_LM", **ADALORA)
    model = peft.get_peft_model(tiny.llama(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        model(**tiny.batch("llama"), use_cache=False).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model


def test_adalora_is_scheduled_as_peft_s_own_loop_does(tmp_path: Path) -> None:
    host = Host(tiny.llama())
    torch.manual_seed(3)
    host.add(bridge("ADALORA", **ADALORA))
    method = host.adapters["default"]
    optimizer = torch.optim.Adam(host.trained().values(), lr=1e-2)
    for index in range(STEPS):
        t = Step(index, STEPS, 0.0)
        method.before_step(host, t)
        penalty = method.penalty(host)
        assert penalty is not None
        (host.model(**tiny.batch("llama"), use_cache=False).loss + penalty).backward()
        method.after_backward(host, t)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(host, t)
    stock = peft_s_own_training()
    with as_built(host, "default") as held:
        theirs = {n: p for n, p in stock.named_parameters() if "lora_" in n}
        ours = {n: p for n, p in held.named_parameters() if "lora_" in n}
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-4)
        pattern = held.peft_config["default"].rank_pattern
    assert sum(map(sum, pattern.values())) == 2 * len(pattern)
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    again = peft.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(logits(again), logits(host.model), atol=1e-6, rtol=1e-5)


def test_adalora_stopped_between_allocations_ends_bit_for_bit_the_same(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    options = {"max_steps": STEPS, "lr": 1e-2, "method": bridge("ADALORA", **ADALORA)}
    straight = make_loop(folder=tmp_path / "straight", **options)
    straight.fit()
    wanted = {n: t.clone() for n, t in straight.host.state().items()}
    paused = interrupted(make_loop, tmp_path / "paused", [4, 10], **options)
    state = paused.host.state()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(t, wanted[n]) for n, t in state.items())


def test_adalora_in_too_few_steps_is_refused() -> None:
    host = Host(tiny.llama())
    host.add(bridge("ADALORA", tinit=5, tfinal=5))
    with pytest.raises(ConfigError, match="leave nothing of the 8 steps"):
        host.adapters["default"].before_step(host, Step(0, 8, 0.0))
