"""`strategy`: how a run's work is spread over its ranks.

    single   one process
    ddp      every rank has the whole model; gradients are summed
    fsdp     as ddp for what trains; frozen weights are sharded and gathered block by block

All give the same losses for the same examples of a step: each rank takes its part of every round
of micro-batches, and the loss is divided by the totals of all ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from peftcli.core.host import Host
from peftcli.dist import fsdp, replicate
from peftcli.dist.ranks import Group, Ranks
from peftcli.errors import ConfigError, RankEnded, Stopped
from peftcli.settings import Run


class Single:
    """One process: nothing to spread."""

    shards = False  # whether frozen weights are cut up, so that all ranks must go through the model

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()

    def refuse(self, host: Host) -> None:
        """Raises `ConfigError` where the adapted model cannot be spread so."""

    def spread(self, host: Host, device: torch.device) -> None:
        """After the method's setup: the model onto the ranks' devices, equal on all."""

    def reduce(self, host: Host) -> None:
        """After the last backward pass of a step: the gradients of the whole step on every rank."""


class Replicated(Single):
    """Every rank has everything."""

    def spread(self, host: Host, device: torch.device) -> None:
        """The adapter of rank 0 everywhere."""
        replicate.start_alike(host, self.ranks)

    def reduce(self, host: Host) -> None:
        """Sums over the ranks."""
        replicate.sum_gradients(host, self.ranks)


class Sharded(Replicated):
    """Every rank has what trains, and its share of the frozen weights."""

    shards = True

    def refuse(self, host: Host) -> None:
        """Refuse a model without frozen weights."""
        fsdp.refuse(host)

    def spread(self, host: Host, device: torch.device) -> None:
        """The adapter of rank 0 everywhere, the base cut up."""
        self.refuse(host)
        super().spread(host, device)
        fsdp.shard(host, device)


STRATEGIES = {"single": Single, "ddp": Replicated, "fsdp": Sharded}


def shards(run: Run) -> bool:
    """Whether the run's strategy cuts frozen weights up."""
    return STRATEGIES[run.strategy.name].shards


def refuse(run: Run) -> None:
    """Raises `ConfigError` where the strategy cannot do what the run asks for."""
    if run.strategy.name == "fsdp" and run.trainer.compile:
        raise ConfigError(
            "strategy=fsdp: gathers the weights that a compiled block holds. Use "
            "trainer.compile=false, or strategy=ddp."
        )
    if run.strategy.name == "fsdp" and run.quantization.name != "none":
        raise ConfigError(
            f"strategy=fsdp: cannot cut up weights in quantization={run.quantization.name}. Use "
            "strategy=ddp, where every rank holds them whole, or quantization=none."
        )


def is_rank() -> bool:
    """Whether this process was started as one of several: by our launcher, torchrun, accelerate."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank_in_environment() -> int:
    """This process's rank; 0 where it is alone."""
    return int(os.environ["RANK"]) if is_rank() else 0


def local_rank() -> int:
    """This process's number on its node, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_rank() else 0


def num_local_ranks() -> int:
    """Processes of the run on this node, which share its cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if is_rank() else 1


def with_numbers(cfg: DictConfig) -> DictConfig:
    """The configuration with the number of ranks that there are, in place of `auto`."""
    if is_rank():
        cfg = cfg.copy()
        cfg.launch.num_processes = num_local_ranks()
        cfg.launch.nnodes = int(os.environ["WORLD_SIZE"]) // num_local_ranks()
    return cfg


@contextmanager
def joined(run: Run, cfg: DictConfig, device: torch.device) -> Iterator[Single]:
    """The run's strategy among its ranks, which all come here once everything slow is done."""
    if not is_rank() or run.strategy.name == "single":
        yield Single()
        return
    on_gpu = device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=run.launch.timeout))
    ranks = Group(device)
    try:
        _refuse_other_configurations(ranks, cfg)
        yield STRATEGIES[run.strategy.name](ranks)
        _leave(ranks)
    except Stopped:  # every rank is stopped at the same step
        _leave(ranks)
        raise
    except RuntimeError as e:
        if not (isinstance(e, dist.DistError) or "gloo" in str(e)):
            raise
        reason = str(e).splitlines()[0]
        raise RankEnded(
            f"rank {ranks.rank} lost the others, of which one has ended, or has not answered for "
            f"launch.timeout={run.launch.timeout:g} seconds ({reason}).",
            RankEnded.exit_code,
        ) from None


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
