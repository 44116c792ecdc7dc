"""Being one of a run's ranks, from the moment when all have come together to the end."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from peftcli import interrupts, written
from peftcli.dist import stalls
from peftcli.dist.environment import is_rank
from peftcli.dist.ranks import Group, Ranks
from peftcli.dist.stalls import Watch
from peftcli.dist.strategies import Single, choose
from peftcli.errors import ConfigError, RankEnded, Stopped
from peftcli.settings import Run


@contextmanager
def joined(run: Run, cfg: DictConfig, device: torch.device) -> Iterator[Single]:
    """The run's strategy among its ranks, which all come here once everything slow is done."""
    if not is_rank() or run.strategy.name == "single":
        yield Single()
        return
    on_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    _refuse_unknown_host()
    with interrupts.heard_in_waits():
        dist.init_process_group(backend, timeout=timedelta(seconds=run.launch.timeout))
    with Watch(Path(run.run_dir), dist.get_rank(), run.launch.timeout) as watch:
        ranks = Group(device, watch.alive)
        try:
            _refuse_other_configurations(ranks, cfg)
            yield choose(run.strategy, ranks)
            _leave(ranks)
        except Stopped:  # every rank is stopped at the same step
            _leave(ranks)
            raise
        except RuntimeError as e:
            if not (isinstance(e, dist.DistError) or "gloo" in str(e)):
                raise
            raise RankEnded(_lost(e, ranks, run), RankEnded.exit_code) from None


def _lost(e: RuntimeError, ranks: Ranks, run: Run) -> str:
    """What a rank says that waits in vain."""
    reason = str(e).splitlines()[0]
    return (
        f"rank {ranks.rank} lost the others, of which one has ended, or has not answered for "
        f"launch.timeout={run.launch.timeout:g} seconds ({reason}). Where ranks stood that no "
        f"longer answered: {run.run_dir}/{stalls.name('*')}"
    )


def _leave(ranks: Ranks) -> None:
    """End together: a rank that is gone early looks like one that failed."""
    ranks.wait()
    dist.destroy_process_group()


def _refuse_unknown_host() -> None:
    """Raise `ConfigError` where the name of rank 0's node means nothing here, which torch would
    try again and again.
    """
    host = os.environ.get("MASTER_ADDR", "localhost")
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as e:
        if e.errno != socket.EAI_AGAIN:  # of a server of names that is busy
            raise ConfigError(
                f"MASTER_ADDR={host}: the node of rank 0 is not known by this name on "
                f"{socket.gethostname()}. Set MASTER_ADDR to an address of it."
            ) from None


def _refuse_other_configurations(ranks: Ranks, cfg: DictConfig) -> None:
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    own = {k: v for k, v in config.items() if k not in ("run_dir", "launch")}
    digest = written.digest(own)
    for rank, theirs in enumerate(ranks.exchange(digest)):
        if theirs != digest:
            raise ConfigError(
                f"ranks {ranks.rank} and {rank} were started with different configurations. Start "
                "the same command on every node; only launch.node_rank differs."
            )
