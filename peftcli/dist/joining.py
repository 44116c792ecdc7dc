"""Being one of a run's ranks, from the moment when all have come together to the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

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
        f"longer answered: {run.run_dir}/{stalls.NAME.format('*')}"
    )


def _leave(ranks: Ranks) -> None:
    """End together: a rank that is gone early looks like one that failed."""
    ranks.wait()
    dist.destroy_process_group()


def _refuse_other_configurations(ranks: Ranks, cfg: DictConfig) -> None:
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    own = {k: v for k, v in config.items() if k not in ("run_dir", "launch")}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True, default=str).encode()).hexdigest()
    for rank, theirs in enumerate(ranks.exchange(digest)):
        if theirs != digest:
            raise ConfigError(
                f"ranks {ranks.rank} and {rank} were started with different configurations. Start "
                "the same command on every node; only launch.node_rank differs."
            )
