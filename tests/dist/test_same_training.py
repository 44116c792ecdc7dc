"""However many ranks and by whatever strategy: the same losses, the same adapter."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from peftcli.core.host import Host
from peftcli.dist.ranks import Ranks
from peftcli.export import adapter
from peftcli.methods.lora import LoRA
from tests import tiny
from tests.dist.conftest import MakeLoop, Together, group, needs_deepspeed, strategy
from tests.laws.test_method_laws import make_method
from tests.train.conftest import chats, loops

EXAMPLES, BATCH, STEPS = 22, 4, 6  # the sixth step has two examples, fewer than four ranks
FIELDS = {
    "spt": {"budget": 2000, "step": 100},
    "bitfit": {"add_missing_bias": True},
    "lisa": {"gamma": 1, "interval_steps": 2},
    "hft": {"resample": "steps", "resample_steps": 2},
}
# Of every family one method at least, and those that choose while they train.
METHODS = {
    "ddp": ("lora", "spiel", "hf_peft", "full", "lisa"),
    "fsdp": (
        *("lora", "adalora", "oft", "bottleneck_adapter", "ssf", "prompt_tuning", "prefix_tuning"),
        *("spiel", "spt", "id3", "bitfit", "hf_peft", "partial", "full", "lisa", "hft"),
    ),
    "fsdp_cpu": ("full",),
    "fsdp_all_cpu": ("lora", "full"),
    "zero1": ("adalora", "full"),
    "zero2": ("lora", "spt", "full", "lisa"),
    "zero3": ("lora", "oft", "prefix_tuning", "spt", "full", "lisa"),
    "zero3_cpu": ("lora",),
}
PAIRS = [(name, method) for name, methods in METHODS.items() for method in methods]
Outcomes = dict[tuple[str, str], list[dict[str, Any]]]


def outcome(loop: Any) -> dict[str, Any]:
    """What a run came to: first state, losses, norms, evaluation, last state, and the adapter that
    rank 0 publishes.
    """
    first, published = loop.host.digest(), loop.folder.path / "adapter"
    loop.fit()
    with loop.strategy.whole(loop.host, everything=False) as keeps_it:
        if keeps_it:
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
        folder=folder / f"{method}-{name}-{ranks.size}",
        method=without_dropout(make_method(method, **FIELDS.get(method, {}))),
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


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Every pair's outcome: of one process, and by rank of two, which stay for all of them."""
    root = tmp_path_factory.mktemp("outcomes")
    here = [(n, m) for n, m in PAIRS if "zero3" not in n or find_spec("deepspeed")]
    torch.set_num_threads(1)
    with loops(root) as make_loop:
        methods = dict.fromkeys(method for _, method in here)
        alone = {m: train(make_loop, root, m, Ranks(), "single") for m in methods}

        def work(ranks: Ranks) -> list[dict]:
            return [train(make_loop, root, method, ranks, name) for name, method in here]

        main, other = group(root)(2, work)
    found = zip(here, main, other, strict=True)
    return {pair: [alone[pair[1]], mine, theirs] for pair, mine, theirs in found}


@pytest.mark.parametrize(
    "pair",
    [pytest.param(p, marks=needs_deepspeed if "zero3" in p[0] else ()) for p in PAIRS],
    ids="-".join,
)
def test_two_ranks_train_as_one(pair: tuple[str, str], outcomes: Outcomes) -> None:
    alone, mine, theirs = outcomes[pair]
    assert_alike(mine, alone)
    assert mine["losses"] == theirs["losses"]
    assert all(torch.equal(t, theirs["state"][n]) for n, t in mine["state"].items())


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


@pytest.mark.parametrize("name", ["fsdp", "zero2", pytest.param("zero3", marks=needs_deepspeed)])
def test_weights_and_optimizer_state_are_divided_and_adapters_whole(
    name: str, make_loop: MakeLoop, together: Together, tmp_path: Path
) -> None:
    def held(loop: Any) -> dict[str, Any]:
        """Numbers that this rank keeps."""
        state = [t for kept in loop.optimizer.state.values() for t in kept.values() if t.ndim]
        return {
            "weights": sum(map(numbers_here, loop.host.model.parameters())),
            "state": sum(t.numel() for t in state),
            "whole": all(numbers_here(p) == p.numel() for p in parts(loop)),
        }

    def parts(loop: Any) -> list[torch.Tensor]:
        return [p for n, p in loop.host.model.named_parameters() if ".deltas." in n]

    def work(ranks: Ranks) -> list[dict[str, Any]]:
        made = []
        for method in ("lora", "full"):
            loop = make_loop(
                folder=tmp_path / f"{method}-{ranks.size}",
                method=make_method(method),
                strategy=strategy(name if ranks.size > 1 else "single", ranks),
                max_steps=1,
                per_device_train_batch_size=BATCH // ranks.size,
            )
            loop.fit()
            made.append(held(loop))
        return made

    alone = work(Ranks())
    cut = {"fsdp": (0.5, 0.5), "zero2": (1.0, 1.0), "zero3": (0.5, 0.5)}[name]
    for found in together(2, work):
        lora, full = found
        assert lora["whole"]
        assert lora["weights"] / alone[0]["weights"] == pytest.approx(cut[0], abs=0.1)
        assert full["weights"] / alone[1]["weights"] == pytest.approx(cut[1], abs=0.05)
        assert full["state"] / alone[1]["state"] == pytest.approx(0.5, abs=0.02)


def numbers_here(parameter: Any) -> int:
    """How many numbers of a parameter this process holds."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


@pytest.mark.parametrize("name", ["fsdp", "zero2", pytest.param("zero3", marks=needs_deepspeed)])
def test_what_each_rank_has_stepped_is_in_checkpoint_and_adapter(
    name: str, make_loop: MakeLoop, together: Together, tmp_path: Path
) -> None:
    def work(ranks: Ranks) -> list[bool]:
        loop = make_loop(
            folder=tmp_path / "run",
            method=make_method("partial"),
            strategy=strategy(name, ranks),
            max_steps=1,
        )
        for share in loop.host.shares.values():
            if share.ranks.size > 1:
                share.own.data.fill_(float(ranks.rank + 1))
        loop.strategy.settle(loop.host)
        saved = loop.save()
        with loop.strategy.whole(loop.host, everything=False) as keeps_it:
            if keeps_it:
                adapter.save(loop.host, "default", tmp_path / "adapter", "causal_lm", "tiny")
        ranks.wait()
        files = saved / "trained.safetensors", tmp_path / "adapter" / "adapter_model.safetensors"
        return [
            rows_say_who_had_them(load_file(file)[name], ranks)
            for file in files
            for name, share in loop.host.shares.items()
            if share.ranks.size > 1
        ]

    for found in together(2, work):
        assert found
        assert all(found)


def rows_say_who_had_them(tensor: torch.Tensor, ranks: Ranks) -> bool:
    """Whether half of the rows are 1, half 2."""
    half = -(-len(tensor) // ranks.size)
    return bool((tensor[:half] == 1).all() and (tensor[half:] == 2).all())


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5", "vit"])
def test_every_architecture_has_the_same_gradients_when_it_is_cut_up(
    model: str, together: Together
) -> None:
    def gradients(host: Host) -> dict[str, torch.Tensor]:
        loss = host.model.train()(**tiny.batch(model)).loss
        loss.backward()
        return {n: p.grad.clone() for n, p in host.trained().items() if p.grad is not None}

    def cut_up(name: str, ranks: Ranks) -> dict[str, torch.Tensor]:
        host = adapted(model)
        host.recompute_activations()
        host.optimizer = torch.optim.SGD(host.trained().values(), 0.1)
        way = strategy(name, ranks)
        host.ranks = ranks
        way.spread(host, torch.device("cpu"))
        host.model.eval()
        with torch.no_grad():
            host.model(**tiny.batch(model))
        gradients(host)
        way.reduce(host)
        return {n: p.grad / 2 for n, p in host.trained().items() if p.grad is not None}

    def work(ranks: Ranks) -> list[dict[str, torch.Tensor]]:
        return [cut_up(name, ranks) for name in names]

    names = ["fsdp", *(["zero3"] if find_spec("deepspeed") else [])]
    wanted = gradients(adapted(model))
    for found in together(2, work):
        for each in found:
            torch.testing.assert_close(each, wanted, atol=1e-6, rtol=1e-4)


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
