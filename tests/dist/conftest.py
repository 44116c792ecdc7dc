"""Real processes that talk through gloo, forked from the test's own so that nothing is imported
again.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from peftcli import settings
from peftcli.dist import strategies
from peftcli.dist.ranks import Group, Ranks
from peftcli.dist.strategies import Single
from tests.train import conftest

make_loop = conftest.make_loop  # the fixture
one_thread = conftest.one_thread
MakeLoop = conftest.MakeLoop
SETTINGS = {
    "single": settings.Strategy("single"),
    "ddp": settings.Strategy("ddp"),
    "fsdp": settings.FSDP(),
    "fsdp_cpu": settings.FSDP(offload="optimizer"),
    "fsdp_all_cpu": settings.FSDP(offload="parameters"),
    "zero1": settings.DeepSpeed(zero_stage=1),
    "zero2": settings.DeepSpeed(zero_stage=2),
    "zero3": settings.DeepSpeed(zero_stage=3),
    "zero3_cpu": settings.DeepSpeed(zero_stage=3, offload="parameters"),
}
needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
Together = Callable[..., list[Any]]


def free_port() -> int:
    """Of this machine, at this moment."""
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


def fork(n: int, work: Callable[[int], None], folder: Path) -> list[int]:
    """Exit codes of n processes that each run `work` with its number; what one fails by is raised
    here.
    """
    context = multiprocessing.get_context("fork")
    arguments = [(number, work, folder) for number in range(n)]
    processes = [context.Process(target=_run, args=args) for args in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    failures = [path.read_text() for path in sorted(folder.glob("failed-*"))]
    assert not failures, "\n".join(failures)
    return [process.exitcode or 0 for process in processes]


def _run(number: int, work: Callable[[int], None], folder: Path) -> None:
    try:
        work(number)
    except Exception:
        (folder / f"failed-{number}").write_text(f"process {number}: {traceback.format_exc()}")
        raise


@pytest.fixture
def together(tmp_path: Path) -> Together:
    """`together(n, work)`: what `work(ranks)` returns on each of n ranks, by rank."""
    return group(tmp_path)


def group(root: Path) -> Together:
    """`together` with its files in `root`."""
    calls = iter(range(100))

    def run(n: int, work: Callable[[Ranks], Any]) -> list[Any]:
        folder = root / f"ranks-{next(calls)}"
        folder.mkdir()

        def be_rank(rank: int) -> None:
            torch.set_num_threads(1)
            os.environ["LOCAL_RANK"] = str(rank)
            store, limit = f"file://{folder}/store", timedelta(seconds=300)
            dist.init_process_group("gloo", store, limit, n, rank)
            torch.save(work(Group(torch.device("cpu"))), folder / f"rank-{rank}")
            dist.barrier()
            dist.destroy_process_group()

        assert fork(n, be_rank, folder) == [0] * n
        return [torch.load(folder / f"rank-{rank}", weights_only=False) for rank in range(n)]

    return run


def strategy(name: str, ranks: Ranks) -> Single:
    """The strategy of this name among the ranks."""
    return strategies.choose(SETTINGS[name], ranks)
