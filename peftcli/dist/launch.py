"""Starting the ranks of a run on this node, through torch's elastic agent.

The configuration is composed once, here; ranks get it as a file. Signals go on to the ranks, which
save and stop together. The exit code is that of the rank that ended first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from peftcli import interrupts
from peftcli.dist import causes, stalls
from peftcli.dist.environment import is_rank
from peftcli.errors import ConfigError, RankEnded, Stopped
from peftcli.screen import say
from peftcli.settings import Launch, Run

SIGNALS = (*interrupts.SIGNALS, signal.SIGHUP)
FILE = "config.yaml"  # of the ranks, in a folder of their own
GRACE = 10  # seconds that ranks have to end once one of them has failed


def starts_ranks(run: Run) -> bool:
    """Whether this process is to start the run's ranks; False where it is the run, or one of them.

    Raises `ConfigError` where ranks were started for a run of one process.
    """
    if not is_rank():
        return run.strategy.name != "single"
    size = int(os.environ["WORLD_SIZE"])
    if run.strategy.name == "single" and size > 1:
        raise ConfigError(
            f"strategy=single: {size} processes were started, and this is a run of one. Use "
            "strategy=ddp, fsdp or deepspeed."
        )
    return False


def start(run: Run, cfg: DictConfig) -> None:
    """Run this node's ranks to their end, again from the newest checkpoint where they were killed
    or broke down. Raises `RankEnded` with what ended them early.
    """
    stalls.forget(Path(run.run_dir))
    for left in range(run.launch.max_restarts, -1, -1):
        cause = _attempt(run, cfg, run.launch.max_restarts - left)
        if cause is None:
            return
        if not left or cause.exit_code != RankEnded.exit_code:
            raise RankEnded(cause.text, cause.exit_code)
        say(f"{cause.text}\nstarting again ({left} of launch.max_restarts left)", "yellow")
        if cfg.resume == "never":  # moves an earlier run aside: once
            cfg.resume = "auto"


def _attempt(run: Run, cfg: DictConfig, restarts: int) -> causes.Cause | None:
    """Run the ranks once, after so many `restarts`; what ended them early, or None."""
    launch = run.launch
    with tempfile.TemporaryDirectory(prefix="peftcli-") as name, _telling(name, restarts):
        folder = Path(name)
        OmegaConf.save(cfg, folder / FILE, resolve=True)
        try:
            agent = _agent(launch, folder)
            with _quiet(), _forwarding(agent) as forwarded:
                result = cast(RunResult, agent.run())
        except RendezvousError as e:
            raise ConfigError(
                f"launch.rdzv_endpoint={launch.rdzv_endpoint}: the nodes did not find each "
                f"other ({e}). Start the same command on all launch.nnodes={launch.nnodes} "
                "nodes, with launch.node_rank=0, 1, ..."
            ) from None
        if not result.is_failed():
            return None
        exit_codes = {rank: failure.exitcode for rank, failure in result.failures.items()}
        if forwarded and all(-code in forwarded for code in exit_codes.values()):
            raise Stopped("stopped before the ranks had begun; nothing to save")
        ranks = {worker.global_rank for worker in agent.get_worker_group().workers}
        silent = sorted(ranks - causes.told(folder))  # ended by us, or by a signal
        if stalled := stalls.told(Path(run.run_dir), silent, launch.timeout):
            return causes.Cause(silent[0], stalled, RankEnded.exit_code, 0.0)
        return causes.first(folder, exit_codes)


def _agent(launch: Launch, folder: Path) -> LocalElasticAgent:
    """The agent that keeps this node's ranks."""
    rendezvous = _rendezvous(launch)
    host, _, port = rendezvous.endpoint.rpartition(":")
    is_static = rendezvous.backend == "static"
    spec = WorkerSpec(
        role="rank",
        local_world_size=num_processes(launch),
        entrypoint=sys.executable,
        args=("-m", "peftcli", "rank", str(folder / FILE)),
        rdzv_handler=get_rendezvous_handler(rendezvous),
        max_restarts=0,
        monitor_interval=0.1,
        master_addr=host if is_static else None,
        master_port=int(port) if is_static else None,
    )
    logs = DefaultLogsSpecs(log_dir=str(folder / "logs"))
    return LocalElasticAgent(spec, logs, shutdown_timeout=GRACE)


def _rendezvous(launch: Launch) -> RendezvousParameters:
    """Where the nodes meet; one node meets itself on a port that is free."""
    if launch.nnodes == 1:
        return RendezvousParameters("c10d", "localhost:0", "peftcli", 1, 1, "localhost")
    endpoint, n = launch.rdzv_endpoint, launch.nnodes
    if endpoint is None or not endpoint.rpartition(":")[2].isdigit():
        raise ConfigError(
            f"launch.rdzv_endpoint={endpoint}: launch.nnodes={n} nodes meet at HOST:PORT of node 0."
        )
    if launch.node_rank >= n:
        raise ConfigError(
            f"launch.node_rank={launch.node_rank}: the nodes of launch.nnodes={n} are 0 to {n - 1}."
        )
    options: dict[str, Any] = {"timeout": int(launch.timeout)}
    if launch.rdzv_backend == "static":
        options["rank"] = launch.node_rank
    return RendezvousParameters(launch.rdzv_backend, endpoint, "peftcli", n, n, **options)


def num_processes(launch: Launch) -> int:
    """Ranks on this node. Raises `ConfigError` where there are fewer GPUs."""
    gpus = torch.cuda.device_count()
    if launch.num_processes == "auto":
        return max(gpus, 1)
    if gpus and launch.num_processes > gpus:
        raise ConfigError(
            f"launch.num_processes={launch.num_processes}: {gpus} GPUs are visible here "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); each "
            "process needs one. Use launch.num_processes=auto."
        )
    return launch.num_processes


def num_ranks(run: Run) -> int:
    """Ranks on all nodes."""
    return 1 if run.strategy.name == "single" else num_processes(run.launch) * run.launch.nnodes


@contextmanager
def _telling(folder: str, restarts: int) -> Iterator[None]:
    """What ranks find in their environment: where to leave what ends them, and which start it is."""
    told = {causes.FOLDER: folder, stalls.RESTARTS[0]: str(restarts)}
    os.environ |= told
    try:
        yield
    finally:
        for key in told:
            del os.environ[key]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the agent's own log, which tells of every rank that ends."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _forwarding(agent: LocalElasticAgent) -> Iterator[list[int]]:
    """Send signals on to the ranks, as SIGTERM: a terminal may have reached them already, and a
    second SIGINT ends them at once. Yields what was sent.
    """
    sent: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        again = bool(sent) and number == signal.SIGINT
        sent.append(signal.SIGINT if again else signal.SIGTERM)
        pids = [w.id for w in agent.get_worker_group().workers if isinstance(w.id, int)]
        if not pids:
            raise KeyboardInterrupt
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent[-1])

    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
    held = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield sent
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
