"""A training of a tiny model over a few made-up examples, without a command line."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftcli.core.host import Host
from peftcli.core.method import Method
from peftcli.data.collate import Batch, Example, make_collator
from peftcli.dist.strategies import Single
from peftcli.errors import Stopped
from peftcli.methods.lora import LoRA
from peftcli.models.attention import use_packed_attention
from peftcli.models.head import direct_head
from peftcli.settings import Optimizer, Scheduler, Trainer
from peftcli.train import checkpoint, loggers, optim, streams
from peftcli.train.evaluate import evaluate
from peftcli.train.folder import Log, MetricsLog, NoLog, RunFolder
from peftcli.train.loop import Loop
from peftcli.train.plan import Plan, Progress
from peftcli.train.preview import Preview
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
    with loops(tmp_path) as make:
        yield make


@contextmanager
def loops(root: Path) -> Iterator[MakeLoop]:
    """What builds loops, whose folders are in `root`."""
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
            method: Method | None = None,
            strategy: Single | None = None,
            **trainer: Any,
        ) -> Loop:
            examples, strategy = examples or chats(22), strategy or Single()
            ranks = stopper.ranks = strategy.ranks
            host = Host(tiny.models()["llama"]())
            method = method or LoRA(r=2, dropout=dropout, target_modules="all-linear")
            packing = packing and method.packs and not method.lays_tokens
            if packing:
                use_packed_attention(host.model)
            head = direct_head(host.model)
            settings = Trainer(**{"per_device_train_batch_size": 4, "max_steps": 12, **trainer})
            choosing = settings.loss == "tfew"
            collate = make_collator("causal_lm", packing=packing, scoring=choosing)
            size = settings.per_device_train_batch_size * ranks.size
            cpu = torch.device("cpu")
            data = Preview(host.model, "causal_lm", examples, collate, size, seed, cpu, head=head)
            host.ranks = ranks
            with streams.stream(seed, "init"):
                host.add(method, data=data)
            plan = Plan.of(settings, len(examples), ranks.size)
            optimizer = optim.make_optimizer(Optimizer("torch.optim.AdamW", lr, 0.01), method, host)
            scheduler = optim.make_scheduler(Scheduler(), optimizer, plan.total)
            strategy.spread(host, cpu)
            run_folder = RunFolder(folder or root / "run")
            run_folder.path.mkdir(parents=True, exist_ok=True)
            streams.seed_all(seed, "dropout")
            scoring = make_collator("causal_lm", packing=packing, scoring=True)

            def open_log(at: Progress) -> Log:
                if not ranks.is_main:
                    return NoLog()
                return MetricsLog(run_folder.metrics, at.step, at.evaluated, loggers.Nothing())

            def publish(place: Path, values: dict[str, float]) -> None:
                with strategy.whole(host, everything=True) as keeps_it:
                    weights = host.model.parameters() if keeps_it else ()
                    assert all(p.isfinite().all() for p in weights)

            def measure() -> dict[str, float]:
                assert held_out is not None
                return evaluate(
                    host.model, "causal_lm", held_out, held_out.lengths, scoring, 3, ranks=ranks
                )

            return Loop(
                host=host,
                method=method,
                task="causal_lm",
                settings=settings,
                plan=plan,
                examples=examples,
                lengths=examples.lengths,
                collate=collate,
                head=head,
                optimizer=optimizer,
                scheduler=scheduler,
                folder=run_folder,
                open_log=open_log,
                screen=QuietScreen(),
                stopper=stopper,
                autocast=None,
                seed=seed,
                evaluate=None if held_out is None else measure,
                publish=publish,
                strategy=strategy,
            )

        yield make


OPTIONS = {
    "held_out": chats(7, 9),
    "eval_steps": 5,
    "dropout": 0.2,
    "gradient_accumulation_steps": 2,
}


def interrupted(
    make_loop: MakeLoop,
    folder: Path,
    at: list[int],
    number: int = signal.SIGTERM,
    **options: Any,
) -> Loop:
    """Start again and again; a signal comes in the middle of each of the steps `at`."""
    while True:
        loop = make_loop(folder=folder, **(options or OPTIONS))
        newest, skipped = checkpoint.newest(loop.folder.checkpoints)
        assert not skipped
        if newest is not None:
            loop.restore(newest)
        if not at:
            loop.fit()
            return loop
        plain, when = loop.collate, at.pop(0)

        def collate(
            examples: Sequence[Example], loop: Loop = loop, plain: Any = plain, when: int = when
        ) -> Batch:
            if loop.progress.step == when and loop.stopper.received is None:
                os.kill(os.getpid(), number)
            return plain(examples)

        loop.collate = collate
        with pytest.raises(Stopped) as stopped:
            loop.fit()
        assert stopped.value.exit_code == 75
        loop.stopper.received = None


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small products are faster, and tests do not fight for cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
