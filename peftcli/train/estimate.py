"""What a run will take, before it starts: memory by what holds it, disk, and time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from peftcli.core import weights
from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.train import device


@dataclass(frozen=True)
class Estimate:
    """Bytes and seconds; rough, for planning."""

    weights: int
    trained: int  # gradients and optimizer moments
    activations: int
    checkpoint: int
    seconds: float

    @property
    def memory(self) -> int:
        """All that is held at the peak of a step."""
        return self.weights + self.trained + self.activations


def estimate(
    host: Host,
    where: torch.device,
    dtype: torch.dtype,
    step_tokens: int,
    row_tokens: int,
    steps: int,
    checkpointing: bool,
    ranks: int = 1,
    shards: bool = False,
    divided: int = 0,
) -> Estimate:
    """Of one of `ranks` processes, for `steps` optimizer steps of `step_tokens` tokens of all,
    `row_tokens` of them in one forward pass of one. `shards`: the base's weights are cut up;
    `divided`: so many of the trained numbers are stepped by one rank each.
    """
    trained = sum(p.numel() for p in host.trained().values())
    stepped = trained - divided + divided // ranks
    sizes = {n: p.numel() * p.element_size() for n, p in host.model.named_parameters()}
    base = sum(size for n, size in sizes.items() if not is_own(n))
    stored = sum(sizes.values()) - base + (base // ranks if shards else base)
    active = _matrix_parameters(host.model)
    flops = (4 * active + 2 * trained) * step_tokens * (4 / 3 if checkpointing else 1)
    rate = device.flops_per_second(where, dtype)
    return Estimate(
        weights=stored,
        trained=stepped * (4 + 8),
        activations=_activation_bytes(host.model, dtype, checkpointing) * row_tokens,
        checkpoint=trained * 12,
        seconds=steps
        * flops
        / rate
        / ranks
        * 1.3,  # what is not a matrix product, measured at a quarter to a third
    )


def _matrix_parameters(model: nn.Module) -> int:
    """Weights that every token is multiplied by: matrices, without embedding tables."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    sizes = weights.sizes(model)
    return sum(
        sizes[p]
        for n, p in model.named_parameters()
        if p.ndim == 2 and id(p) not in tables and not is_own(n)
    )


def _activation_bytes(model: nn.Module, dtype: torch.dtype, checkpointing: bool) -> int:
    """Bytes that a token leaves for the backward pass: inputs of products, gates, norms; one row a
    block when recomputed.
    """
    config = model.config
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", 512)
    layers = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", 12)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "d_ff", None) or 4 * width
    element = 2 if dtype in (torch.bfloat16, torch.float16) else 4
    per_layer = width if checkpointing else 10 * width + 4 * inner
    return layers * per_layer * element
