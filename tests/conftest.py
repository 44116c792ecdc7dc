"""Whole runs through the command line, in processes of their own, on tiny models in folders."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peftcli.cli import main
from peftcli.train.folder import MetricsLog
from tests import tiny

Cli = Callable[..., "Done"]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models: llama, gpt2, bert, t5, vit."""
    root = tmp_path_factory.mktemp("models")
    for name in ("llama", "gpt2", "bert", "t5", "vit"):
        getattr(tiny, f"tiny_{name}")(root / name)
    return root


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of all runs."""
    return tmp_path_factory.mktemp("cache")


def environment(cache: Path) -> dict[str, str]:
    """Of the process that runs `peft-train`: no network, one thread, a cache of its own."""
    return {
        **os.environ,
        "PEFTCLI_CACHE": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
    }


def connect_here(own: socket.socket, address: Any, plain: Any = socket.socket.connect) -> None:
    """Connect to processes of this machine; refuse what is elsewhere."""
    if own.family != socket.AF_UNIX and address[0] not in ("localhost", "127.0.0.1", "::1"):
        raise OSError(f"a run asked the network for {address}")
    plain(own, address)


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Cli:
    """`peft-train` with these words, in an empty folder; `code` is the exit code to expect.

    In this process: a fresh one spends seconds on imports. Tests of signals start their own.
    Nothing outside of this machine is reached.
    """
    for name, value in environment(cache).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", connect_here)

    def run(*words: object, code: int | None = 0) -> Done:
        capsys.readouterr()
        try:
            returned = main([str(word) for word in words])
        except SystemExit as e:  # argparse ends so
            returned = e.code if isinstance(e.code, int) else 2
        done = Done(returned, *capsys.readouterr())
        assert code in (None, returned), f"exit {returned}\n{done.stdout}\n{done.stderr}"
        return done

    return run


def signalled(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """This process gets a signal at the moment when metrics.jsonl shows the step."""
    write = MetricsLog.write

    def watched(log: MetricsLog, record: Mapping[str, Any]) -> None:
        write(log, record)
        if record["step"] == step and "loss" in record:
            monkeypatch.setattr(MetricsLog, "write", write)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(MetricsLog, "write", watched)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A file of forty short conversations."""
    return write_chats(tmp_path)


def write_chats(folder: Path) -> Path:
    file = folder / "chats.jsonl"
    with file.open("w") as f:
        for i in range(40):
            turns = [("user", f"what is {i} plus one"), ("assistant", f"it is {i + 1}")]
            f.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return file


@pytest.fixture
def tiny_run(models: Path, chats: Path, tmp_path: Path) -> list[str]:
    """Words of a short run on the tiny Llama."""
    return short_run(models, chats, tmp_path)


def short_run(models: Path, chats: Path, folder: Path) -> list[str]:
    return [
        "+recipe=lora_llama_chat",
        f"model.name_or_path={models / 'llama'}",
        f"dataset.path={chats}",
        "dataset.eval_samples=6",
        "trainer.max_steps=6",
        "trainer.per_device_train_batch_size=4",
        "method.r=4",
        f"run_dir={folder / 'run'}",
    ]
