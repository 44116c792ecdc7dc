"""`strategy`: how a run's work is spread over its ranks.

    single     one process
    ddp        every rank has the whole model; gradients are summed
    fsdp       the base's weights are cut up and gathered block by block; adapters as ddp
    deepspeed  ZeRO: stages 1 and 2 divide what trains, 3 the base's weights as well

All give the same losses for the same examples of a step: each rank takes its part of every round
of micro-batches, and the loss is divided by the totals of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peftcli.core import weights
from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.core.shares import is_matrix, settle
from peftcli.dist import ds_config, fsdp, replicate, zero
from peftcli.dist.ranks import Ranks
from peftcli.errors import ConfigError
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

    def reduce(self, host: Host, *numbers: float) -> tuple[float, ...]:
        """After the last backward pass of a step: the gradients of the whole step on every rank,
        and the sums over ranks of `numbers`, which go with them.
        """
        return numbers

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

    def reduce(self, host: Host, *numbers: float) -> tuple[float, ...]:
        """Sums over the ranks."""
        return replicate.sum_gradients(host, self.ranks, *numbers)


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
        fsdp.shard(host, device, self.settings.offload)


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

    def reduce(self, host: Host, *numbers: float) -> tuple[float, ...]:
        """Sums over the ranks; weights that the backward pass left gathered are let go."""
        sums = super().reduce(host, *numbers)
        if self.shards:
            self.keeper.release_backward_leftovers()
        return sums

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


def refuse_bits(run: Run, stored: str) -> None:
    """Raises `ConfigError` where the strategy would cut up weights that are `stored` quantised."""
    if shards(run):
        raise ConfigError(
            f"{_named(run)}: cannot cut up weights that are stored in {stored}. Use strategy=ddp, "
            "where every rank holds them whole, or quantization=none and a model that is stored "
            "plain."
        )


def _named(run: Run) -> str:
    """The strategy as it is written, with DeepSpeed's stage where it cuts weights up."""
    stage = " strategy.zero_stage=3" if isinstance(run.strategy, DeepSpeed) else ""
    return f"strategy={run.strategy.name}{stage}"


def refuse(run: Run) -> None:
    """Raises `ConfigError` where the strategy cannot do what the run asks for."""
    if shards(run) and run.trainer.compile:
        raise ConfigError(
            f"{_named(run)}: gathers the weights that a compiled block holds. Use "
            "trainer.compile=false, or strategy=ddp."
        )
    if isinstance(run.strategy, DeepSpeed):
        ds_config.check(run)
        if run.strategy.zero_stage == 3:
            zero.refuse_missing()
