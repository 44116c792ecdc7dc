"""`strategy`: how a run's work is spread over its ranks.

    single     one process
    ddp        every rank has the whole model; gradients are summed
    fsdp       the base's weights are cut up and gathered block by block; adapters as ddp
    deepspeed  ZeRO: stages 1 and 2 divide what trains, 3 the base's weights as well

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

from torch import nn

from peftcli.core import weights
from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.core.shares import is_matrix, settle
from peftcli.dist import ds_config, fsdp, replicate, zero
from peftcli.dist.ranks import Group, Ranks
from peftcli.errors import ConfigError, RankEnded, Stopped
from peftcli.settings import FSDP, DeepSpeed, Run, Strategy
from peftcli.train import optim

# Optimizers that step every number by its own gradient alone.
ELEMENTWISE = {"Adam", "AdamW", "Adamax", "Adagrad", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}


class Single:
    """One process: nothing to spread."""

    shards = False  # whether the base's weights are cut up, so that all ranks must go through it

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()

    def spread(self, host: Host, device: torch.device) -> None:
        """After the method's setup: the model onto the ranks' devices, equal on all; and into the
        optimizer what a rank steps.
        """

    def reduce(self, host: Host) -> None:
        """After the last backward pass of a step: the gradients of the whole step on every rank."""

    def clip(self, host: Host, max_norm: float | None) -> float:
        """Hand the gradients to the optimizer, scaled down to `max_norm`; returns the norm that
        they had.
        """
        for share in host.shares.values():
            share.take()
        return optim.clip(host, max_norm)

    def settle(self, host: Host) -> None:
        """After the optimizer's step: what it stepped, back in the model; what rests is there."""
        stepped = [s for s in host.shares.values() if s.parameter.requires_grad]
        settle(stepped, self.ranks)

    @contextmanager
    def whole(self, host: Host, everything: bool) -> Iterator[bool]:
        """All ranks come here; within, the model of rank 0, for which it is True, has what trains
        (or everything) whole, in the memory of the CPU where ranks divide it.
        """
        yield self.ranks.is_main


class Replicated(Single):
    """Every rank has everything."""

    def spread(self, host: Host, device: torch.device) -> None:
        """The adapter of rank 0 everywhere."""
        replicate.start_alike(host, self.ranks)

    def reduce(self, host: Host) -> None:
        """Sums over the ranks."""
        replicate.sum_gradients(host, self.ranks)


class Divided(Replicated):
    """Ranks divide what trains, or the base, or both."""

    def spread(self, host: Host, device: torch.device) -> None:
        """The adapter of rank 0 everywhere; then each rank its share."""
        super().spread(host, device)
        before = {p: n for n, p in host.model.named_parameters()}
        self.divide(host, device)
        shares, optimizer = host.shares, host.optimizer
        assert optimizer is not None, "no optimizer yet"
        for group in optimizer.param_groups:
            params = [(before[p], p) for p in group["params"]]
            group["params"] = [shares[n].own if n in shares else p for n, p in params]

    def divide(self, host: Host, device: torch.device) -> None:
        """Make the shares."""
        raise NotImplementedError

    @contextmanager
    def whole(self, host: Host, everything: bool) -> Iterator[bool]:
        """Gathered one at a time; the other ranks keep nothing of it."""
        shares, host.shares = host.shares, {}
        divided = {share.parameter for share in shares.values()}
        places = [
            (module._parameters, name, parameter)
            for module in host.model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and (everything or parameter in divided)
        ]
        held: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in dict.fromkeys(p for _, _, p in places):  # tied weights once
            W = weights.whole(parameter)
            if W is not parameter and self.ranks.is_main:
                held[parameter] = nn.Parameter(W.detach().cpu(), parameter.requires_grad)
        if self.ranks.is_main:
            for parameters, name, parameter in places:
                parameters[name] = held.get(parameter, parameter)
        try:
            yield self.ranks.is_main
        finally:
            for parameters, name, parameter in places:
                parameters[name] = parameter
            host.shares = shares


class Sharded(Divided):
    """FSDP2."""

    shards = True

    def __init__(self, ranks: Ranks, settings: FSDP) -> None:
        super().__init__(ranks)
        self.settings = settings

    def divide(self, host: Host, device: torch.device) -> None:
        """The base's weights, with the optimizer state of those that train."""
        fsdp.shard(host, device, self.settings.offload == "optimizer")


class Zero(Divided):
    """ZeRO."""

    def __init__(self, ranks: Ranks, settings: DeepSpeed) -> None:
        super().__init__(ranks)
        self.settings = settings
        self.shards = settings.zero_stage == 3
        self.keeper: Any = None  # of the base's weights, in stage 3

    def divide(self, host: Host, device: torch.device) -> None:
        """What trains; in stage 3 the base as well."""
        if self.shards:
            zero.place_adapters(host, device)
        zero.divide(host, self.settings, device)
        if self.shards:
            told = ds_config.of_partitions(self.settings)
            self.keeper = zero.partition(host, told, device)

    def reduce(self, host: Host) -> None:
        """Sums over the ranks; weights that the backward pass left gathered are let go."""
        super().reduce(host)
        if self.shards:
            self.keeper.release_backward_leftovers()

    @contextmanager
    def whole(self, host: Host, everything: bool) -> Iterator[bool]:
        """Gathered one at a time, when nothing is on its way any more."""
        if self.shards:
            with host.bare():
                self.keeper.empty_partition_cache()
        with super().whole(host, everything) as keeps_it:
            yield keeps_it


def choose(settings: Strategy, ranks: Ranks) -> Single:
    """The strategy of these settings among the ranks."""
    if isinstance(settings, FSDP):
        return Sharded(ranks, settings)
    if isinstance(settings, DeepSpeed):
        return Zero(ranks, settings)
    return Replicated(ranks) if settings.name == "ddp" else Single(ranks)


def shards(run: Run) -> bool:
    """Whether the run's strategy cuts the base's weights up."""
    strategy = run.strategy
    return isinstance(strategy, FSDP) or (
        isinstance(strategy, DeepSpeed) and strategy.zero_stage == 3
    )


def num_divided(run: Run, host: Host) -> int:
    """How many of the numbers that train are each stepped by one rank alone."""
    strategy = run.strategy
    if not isinstance(strategy, FSDP | DeepSpeed):
        return 0
    adapters = isinstance(strategy, DeepSpeed)
    trained = host.trained().items()
    return sum(p.numel() for n, p in trained if is_matrix(p) and (adapters or not is_own(n)))


def refuse_optimizer(run: Run, host: Host) -> None:
    """Raises `ConfigError` where the optimizer of the adapted model cannot step parts of it."""
    name = type(host.optimizer).__name__
    if name not in ELEMENTWISE and num_divided(run, host):
        raise ConfigError(
            f"optimizer: {name} looks at whole matrices, of which strategy={run.strategy.name} "
            f"gives each process some rows. Use one of {', '.join(sorted(ELEMENTWISE))}, or "
            "strategy=ddp."
        )


def refuse(run: Run) -> None:
    """Raises `ConfigError` where the strategy cannot do what the run asks for."""
    stage = " strategy.zero_stage=3" if isinstance(run.strategy, DeepSpeed) else ""
    if shards(run) and run.trainer.compile:
        raise ConfigError(
            f"strategy={run.strategy.name}{stage}: gathers the weights that a compiled block holds. "
            "Use trainer.compile=false, or strategy=ddp."
        )
    if shards(run) and run.quantization.name != "none":
        raise ConfigError(
            f"strategy={run.strategy.name}{stage}: cannot cut up weights in "
            f"quantization={run.quantization.name}. Use strategy=ddp, where every rank holds them "
            "whole, or quantization=none."
        )
    if isinstance(run.strategy, DeepSpeed):
        ds_config.check(run)
        if run.strategy.zero_stage == 3:
            zero.refuse_missing()


def is_rank() -> bool:
    """Whether this process was started as one of several: by our launcher or by another."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank_in_environment() -> int:
    """This process's rank; 0 where it is alone."""
    return int(os.environ["RANK"]) if is_rank() else 0


def local_rank() -> int:
    """This process's number on its node, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_rank() else 0


def num_local_ranks() -> int:
    """Processes of the run on this node, which share its cores."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # the second is of DeepSpeed's launcher
    found = next((os.environ[name] for name in names if name in os.environ), "1")
    return int(found) if is_rank() else 1


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
        yield choose(run.strategy, ranks)
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
