"""Training steps of several programs, each in a process of its own, taken in turn: on a shared
machine only what is measured side by side can be compared.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import TypedDict, TypeVar

from peftcli.cli import WAITING

K = TypeVar("K", bound=Hashable)
Step = Callable[[], float]  # takes one step, returns its loss


class Answer(TypedDict):
    """One step: its time, its loss, and the most memory that its process held so far (bytes)."""

    seconds: float
    loss: float
    peak: int


def serve(make_step: Callable[[], Step]) -> None:
    """Be a worker: answer each line of stdin with one step. The first step, which warms up, is not
    timed; whatever else is printed goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step = make_step()
    step()
    import torch

    from peftcli.train.device import peak_memory, pick

    device = pick()
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        answer = Answer(seconds=time.perf_counter() - start, loss=loss, peak=peak_memory(device))
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def race(
    commands: Mapping[K, list[str]], rounds: int, ours: Collection[K]
) -> dict[K, list[Answer]]:
    """The answers of every worker to `rounds` requests, asked in turn; of those that fail, none.

    The threads of `ours` wait as `peft-train` has them wait, those of the others as libraries do.
    """
    env = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    workers = {
        key: subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=env | WAITING if key in ours else env
        )
        for key, command in commands.items()
    }
    answers: dict[K, list[Answer]] = {key: [] for key in workers}
    for _ in range(rounds):
        for key, worker in workers.items():
            assert worker.stdin
            assert worker.stdout
            try:
                worker.stdin.write("go\n")
                worker.stdin.flush()
                answers[key].append(json.loads(worker.stdout.readline()))
            except (BrokenPipeError, json.JSONDecodeError):
                answers[key] = []
    for worker in workers.values():
        try:
            worker.communicate()
        except BrokenPipeError:
            worker.wait()
    return answers
