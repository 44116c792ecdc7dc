"""However many ranks and by whatever strategy: the same losses, the same adapter."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftcli.core.host import Host
from peftcli.dist.ranks import Ranks
from peftcli.errors import ConfigError
from peftcli.export import adapter
from peftcli.methods.lora import LoRA
from tests import tiny
from tests.dist.conftest import MakeLoop, Together, strategy
from tests.laws.test_method_laws import make_method
from tests.train.conftest import chats

EXAMPLES, BATCH, STEPS = 22, 4, 7  # the sixth step has two examples, fewer than four ranks
FAMILIES = {  # of every family one method at least, and those that choose while they train
    "lora": {},
    "adalora": {},
    "oft": {},
    "bottleneck_adapter": {},
    "ssf": {},
    "prompt_tuning": {},
    "prefix_tuning": {},
    "spiel": {},
    "spt": {"budget": 2000, "step": 100},
    "id3": {},
    "bitfit": {"add_missing_bias": True},
    "hf_peft": {},
}


def outcome(loop: Any) -> dict[str, Any]:
    """What a run came to: first state, losses, norms, evaluation, last state, and the adapter that
    rank 0 publishes.
    """
    first, published = loop.host.digest(), loop.folder.path / "adapter"
    loop.fit()
    if loop.ranks.is_main:
        adapter.save(loop.host, "default", published, "causal_lm", "tiny")
    return {
        "adapter": published,
        "first": first,
        "losses": [r["loss"] for r in loop.screen.records],
        "norms": [r["grad_norm"] for r in loop.screen.records],
        "targets": [r["targets"] for r in loop.screen.records],
        "eval": loop.progress.last,
        "state": {n: t.clone() for n, t in loop.host.state().items()},
    }


def train(make_loop: MakeLoop, folder: Path, method: str, ranks: Ranks, name: str) -> dict:
    loop = make_loop(
        chats(EXAMPLES),
        folder=folder / f"{name}-{ranks.size}",
        method=without_dropout(make_method(method, **FAMILIES.get(method, {}))),
        held_out=chats(7, 9),
        lr=1e-3,
        strategy=strategy(name, ranks),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // ranks.size,
    )
    return outcome(loop)


def without_dropout(method: Any) -> Any:
    """Ranks draw dropout from streams of their own."""
    off = {f.name: 0.0 for f in dataclasses.fields(method) if f.name in ("dropout", "drop_path")}
    return dataclasses.replace(method, **off)


def assert_alike(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["first"] == wanted["first"]
    assert found["losses"] == pytest.approx(wanted["losses"], abs=1e-5)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-3, abs=1e-5)
    assert found["targets"] == wanted["targets"]
    assert found["eval"] == pytest.approx(wanted["eval"], abs=1e-4)
    torch.testing.assert_close(found["state"], wanted["state"], atol=1e-4, rtol=1e-3)
    assert_published_alike(found["adapter"], wanted["adapter"])


def assert_published_alike(found: Path, wanted: Path) -> None:
    """The same files, which one process loads."""
    tensors, others = (load_file(f / "adapter_model.safetensors") for f in (found, wanted))
    torch.testing.assert_close(tensors, others, atol=1e-4, rtol=1e-3)
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (found, wanted)]
    assert configs[0] == configs[1]
    adapter.load(Host(tiny.models()["llama"]()), found)


@pytest.mark.parametrize("method", FAMILIES)
def test_two_ranks_train_as_one(
    method: str, make_loop: MakeLoop, together: Together, tmp_path: Path
) -> None:
    alone = train(make_loop, tmp_path, method, Ranks(), "single")

    def work(ranks: Ranks) -> list[dict]:
        return [train(make_loop, tmp_path, method, ranks, name) for name in ("ddp", "fsdp")]

    main, other = together(2, work)
    for mine, theirs in zip(main, other, strict=True):
        assert_alike(mine, alone)
        assert mine["losses"] == theirs["losses"]
        assert all(torch.equal(t, theirs["state"][n]) for n, t in mine["state"].items())


@pytest.mark.parametrize("method", ["full", "lisa"])
def test_methods_that_leave_nothing_frozen_train_alike_with_ddp_and_are_refused_by_fsdp(
    method: str, make_loop: MakeLoop, together: Together, tmp_path: Path
) -> None:
    alone = train(make_loop, tmp_path, method, Ranks(), "single")

    def work(ranks: Ranks) -> dict:
        with pytest.raises(ConfigError, match="leaves none. Use strategy=ddp"):
            train(make_loop, tmp_path, method, ranks, "fsdp")
        return train(make_loop, tmp_path, method, ranks, "ddp")

    main, other = together(2, work)
    assert_alike(main, alone)
    assert all(torch.equal(t, other["state"][n]) for n, t in main["state"].items())


@pytest.mark.parametrize("method", ["lora", "spiel"])
def test_four_ranks_train_as_one_though_a_step_has_fewer_examples(
    method: str, make_loop: MakeLoop, together: Together, tmp_path: Path
) -> None:
    alone = train(make_loop, tmp_path, method, Ranks(), "single")
    for found in together(4, lambda ranks: train(make_loop, tmp_path, method, ranks, "fsdp")):
        assert_alike(found, alone)


def test_accumulation_and_ranks_divide_a_step_alike(
    make_loop: MakeLoop, together: Together, tmp_path: Path
) -> None:
    options = {"lr": 1e-3, "max_steps": 4, "max_grad_norm": 0.1}

    def work(ranks: Ranks, size: int, times: int) -> dict:
        loop = make_loop(
            folder=tmp_path / f"{ranks.size}-{size}",
            strategy=strategy("ddp", ranks),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
            **options,
        )
        return outcome(loop)

    alone = work(Ranks(), 8, 1)
    for found in together(2, lambda ranks: work(ranks, 2, 2)):
        assert found["losses"] == pytest.approx(alone["losses"], abs=1e-6)
        assert found["norms"] == pytest.approx(alone["norms"], rel=1e-4)


def test_frozen_weights_are_cut_up_and_what_trains_is_whole(
    make_loop: MakeLoop, together: Together, tmp_path: Path
) -> None:
    def work(ranks: Ranks) -> tuple[float, bool]:
        loop = make_loop(folder=tmp_path, strategy=strategy("fsdp", ranks))
        named = dict(loop.host.model.named_parameters())
        local = {n: p.to_local() if hasattr(p, "to_local") else p for n, p in named.items()}
        trained = loop.host.trained()
        frozen = [n for n in named if n not in trained]
        held = sum(local[n].numel() for n in frozen) / sum(named[n].numel() for n in frozen)
        return held, all(local[n] is p for n, p in trained.items())

    for held, is_whole in together(2, work):
        assert held == pytest.approx(0.5, abs=0.01)
        assert is_whole


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5", "vit"])
def test_every_architecture_has_the_same_gradients_when_it_is_cut_up(
    model: str, together: Together
) -> None:
    def gradients(host: Host) -> dict[str, torch.Tensor]:
        loss = host.model.train()(**tiny.batch(model)).loss
        loss.backward()
        return {n: p.grad.clone() for n, p in host.trained().items() if p.grad is not None}

    def work(ranks: Ranks) -> dict[str, torch.Tensor]:
        host = adapted(model)
        host.recompute_activations()
        way = strategy("fsdp", ranks)
        way.spread(host, torch.device("cpu"))
        host.model.eval()
        with torch.no_grad():
            host.model(**tiny.batch(model))
        gradients(host)
        way.reduce(host)
        return {n: p.grad / 2 for n, p in host.trained().items() if p.grad is not None}

    wanted = gradients(adapted(model))
    for found in together(2, work):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def adapted(model: str) -> Host:
    """LoRA whose B is not zero, so that all gradients are there."""
    host = Host(tiny.models()[model]())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        host.add(LoRA(target_modules="all-linear"))
        for name, p in host.trained().items():
            if name.endswith(".B"):
                torch.nn.init.normal_(p, std=0.1)
    return host
