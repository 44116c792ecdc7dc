"""A training of a tiny model over a few made-up examples, without a command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftcli.core.host import Host
from peftcli.data.collate import make_collator
from peftcli.methods.lora import LoRA
from peftcli.models.attention import use_packed_attention
from peftcli.models.head import direct_head
from peftcli.settings import Optimizer, Scheduler, Trainer
from peftcli.train import loggers, optim, streams
from peftcli.train.evaluate import evaluate
from peftcli.train.folder import MetricsLog, RunFolder
from peftcli.train.loop import Loop, Plan
from peftcli.train.signals import Stopper
from tests import tiny


class QuietScreen:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def step(self, done: int, total: int, record: dict[str, Any]) -> None:
        self.records.append(record)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        pass

    def note(self, text: str) -> None:
        self.notes.append(text)


class Examples(list):
    """A list of examples with their lengths."""

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(e["input_ids"]) for e in self])


def chats(n: int, seed: int = 0) -> Examples:
    """Examples that begin alike, differ in length, and end in one of two answers of one token and
    an end token.
    """
    draw = np.random.default_rng(seed)
    made = Examples()
    for i in range(n):
        question, answer = draw.integers(10, 60, draw.integers(2, 9)), int(draw.integers(2))
        prompt = np.concatenate([[5, 6, 7, 8], question]).astype(np.int32)
        ids = np.concatenate([prompt, [[3], [4]][answer], [2, 9]]).astype(np.int32)
        P = len(prompt)
        made.append(
            {
                "id": f"e{i}",
                "input_ids": ids,
                "supervised": np.isin(
                    np.arange(len(ids)), [P, P + 1]
                ),  # not the newline behind the end
                "prompt_length": P,
                "choices": [np.array([3], np.int32), np.array([4], np.int32)],
                "answer": answer,
            }
        )
    return made


MakeLoop = Callable[..., Loop]


@pytest.fixture
def make_loop(tmp_path: Path) -> Iterator[MakeLoop]:
    """Builds loops over the tiny Llama; further keyword arguments are the trainer's."""
    with Stopper() as stopper:

        def make(
            examples: Examples | None = None,
            *,
            folder: Path | None = None,
            packing: bool = True,
            dropout: float = 0.0,
            seed: int = 0,
            held_out: Examples | None = None,
            lr: float = 1e-2,
            **trainer: Any,
        ) -> Loop:
            examples = examples or chats(22)
            host = Host(tiny.models()["llama"]())
            method = LoRA(r=2, dropout=dropout, target_modules="all-linear")
            with streams.stream(seed, "init"):
                host.add(method)
            if packing:
                use_packed_attention(host.model)
            settings = Trainer(**{"per_device_train_batch_size": 4, "max_steps": 12, **trainer})
            plan = Plan.of(settings, len(examples))
            optimizer = optim.make_optimizer(Optimizer("torch.optim.AdamW", lr, 0.01), method, host)
            run_folder = RunFolder(folder or tmp_path / "run")
            run_folder.path.mkdir(parents=True, exist_ok=True)
            streams.seed_all(seed, "dropout")
            scoring = make_collator("causal_lm", packing=packing, scoring=True)
            return Loop(
                host=host,
                method=method,
                task="causal_lm",
                settings=settings,
                plan=plan,
                examples=examples,
                lengths=examples.lengths,
                collate=make_collator("causal_lm", packing=packing),
                head=direct_head(host.model),
                optimizer=optimizer,
                scheduler=optim.make_scheduler(Scheduler(), optimizer, plan.total),
                folder=run_folder,
                open_log=lambda step: MetricsLog(run_folder.metrics, step, loggers.Nothing()),
                screen=QuietScreen(),
                stopper=stopper,
                autocast=None,
                seed=seed,
                evaluate=None
                if held_out is None
                else lambda: evaluate(
                    host.model, "causal_lm", held_out, held_out.lengths, scoring, 3
                ),
                publish_best=lambda values: None,
            )

        yield make


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are faster, and tests do not fight for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
