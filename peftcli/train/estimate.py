"""What a run will take, before it starts: memory by what holds it, disk, and time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from peftcli.core import weights
from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.kernels.linear_cross_entropy import BLOCK_ROWS
from peftcli.train import device
from peftcli.train.probe import Working


@dataclass(frozen=True)
class Load:
    """The heaviest forward pass of one process, and what the run does around it."""

    tokens: int  # laid, padding included; or images
    targets: int
    accumulates: bool  # gradients are there already while a forward pass runs
    in_blocks: bool  # the head sees `BLOCK_ROWS` targets at a time


@dataclass(frozen=True)
class Held:
    """Bytes that are in one process's memory whatever a step computes."""

    process: int  # on the CPU, interpreter, libraries and data
    weights: int  # the model without what methods add
    deltas: int
    gradients: int
    optimizer: int


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step of one process."""

    held: Held
    working: Working
    load: Load
    spread: float = 1.0  # bytes that the allocator takes for a byte of tensors that come and go

    @property
    def activations(self) -> int:
        """What the forward pass leaves for the backward one."""
        return self.working.saved.at(self.load.tokens)

    @property
    def logits(self) -> int:
        """What the head and the loss hold on top for a moment."""
        rows = min(self.load.targets, BLOCK_ROWS) if self.load.in_blocks else self.load.targets
        return self.working.answering.at(rows)

    @property
    def passing(self) -> int:
        """What a forward and backward pass needs at its peak: as activations go, gradients come."""
        turning = self.working.turning.at(self.load.tokens)
        gradients = max(self.activations, self.held.gradients)
        return max(self.activations + self.logits, gradients + turning)

    @property
    def gaps(self) -> int:
        """What the allocator cannot use again of what tensors have left."""
        return round((self.spread - 1) * self.passing)

    @property
    def total(self) -> int:
        """At the peak of a step, with the gradients that earlier passes of it have left."""
        held = self.held
        always = held.process + held.weights + held.deltas + held.optimizer
        if self.load.accumulates:
            turning = self.working.turning.at(self.load.tokens)
            passing = held.gradients + self.activations + max(self.logits, turning)
            return always + passing + self.gaps
        return always + self.passing + self.gaps

    def at(self, fraction: float) -> Memory:
        """With this part of the tokens in a forward pass, and more passes to a step."""
        load = self.load
        tokens, targets = round(load.tokens * fraction), round(load.targets * fraction)
        return replace(self, load=replace(load, tokens=tokens, targets=targets, accumulates=True))


@dataclass(frozen=True)
class Estimate:
    """Of one process."""

    held: Held
    checkpoint: int  # bytes
    seconds: float  # of all training steps; rough


def held(
    host: Host,
    where: torch.device,
    optimizer: int,
    ranks: int = 1,
    shards: bool = False,
    divided: int = 0,
) -> Held:
    """`optimizer` are the bytes of its state. `shards`: the base's weights are cut up among ranks;
    `divided`: so many of the trained numbers are stepped by one rank each.
    """
    tensors = {**dict(host.model.named_parameters()), **dict(host.model.named_buffers())}
    own = sum(t.nbytes for n, t in tensors.items() if is_own(n))
    base = sum(t.nbytes for n, t in tensors.items() if not is_own(n))
    trained = list(host.trained().values())
    count = sum(p.numel() for p in trained)
    share = (count - divided + divided / ranks) / max(count, 1)
    if where.type == "cpu":
        device.make_resident(tensors.values())
    return Held(
        process=max(device.resident_memory() - base - own, 0) if where.type == "cpu" else 0,
        weights=base // ranks if shards else base,
        deltas=own,
        gradients=round(share * sum(p.nbytes for p in trained)),
        optimizer=round(share * optimizer),
    )


def checkpoint_bytes(host: Host, optimizer: int) -> int:
    """Of one checkpoint: what trains, its optimizer's state, and a little around them."""
    around = 200 * 3 * len(host.state()) + 20_000  # names in headers; random streams, manifest
    return sum(t.nbytes for t in host.state().values()) + optimizer + around


def seconds(
    host: Host,
    where: torch.device,
    dtype: torch.dtype,
    step_tokens: int,
    steps: int,
    checkpointing: bool,
    ranks: int = 1,
) -> float:
    """Of `steps` optimizer steps of `step_tokens` tokens of all ranks."""
    trained = sum(p.numel() for p in host.trained().values())
    active = _matrix_parameters(host.model)
    flops = (4 * active + 2 * trained) * step_tokens * (4 / 3 if checkpointing else 1)
    rate = device.flops_per_second(where, dtype)
    # what is not a matrix product was measured at a quarter to a third
    return steps * flops / rate / ranks * 1.3


def _matrix_parameters(model: nn.Module) -> int:
    """Weights that every token is multiplied by: matrices, without embedding tables."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    sizes = weights.sizes(model)
    return sum(
        sizes[p]
        for n, p in model.named_parameters()
        if p.ndim == 2 and id(p) not in tables and not is_own(n)
    )
