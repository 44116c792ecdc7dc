"""SpIEL's optimizers: Adam with an age for every entry, and SM3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftcli.methods.sparse import SparseDelta


class AgedAdamW(Optimizer):
    """AdamW with an age for every entry, so that each has its own bias correction; the ages are
    float32 and count from 1. Decay is of the new value: for a delta, towards the pretrained weight.
    """

    BETAS = (0.9, 0.999)
    EPS = 1e-6

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-5, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2; the update is lr times m / (1 - b1^age)
        over (sqrt(v) + eps) / sqrt(1 - b2^age).
        """
        b1, b2 = self.BETAS
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state, g = self.state[p], p.grad
                if "age" not in state:
                    state["age"] = torch.ones_like(p, dtype=torch.float32)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                age, m, v = state["age"], state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(g, 1 - b1)
                v.mul_(b2).addcmul_(g, g, value=1 - b2)
                spread = v.sqrt().add_(self.EPS) / (1 - b2**age).sqrt_()
                p.sub_(m / (1 - b1**age) / spread, alpha=group["lr"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                age.add_(1)


class SM3(Optimizer):
    """SM3-II without momentum (Anil et al. 2019, arXiv 1901.11150): instead of a second moment for
    every entry, one for every row and one for every column, each the largest of what lies in it.
    Entries are those of a delta's weight, or all of a dense tensor's.
    """

    EPS = 1e-8

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """u = min(row, column) + g^2; the update is lr g / sqrt(u + eps); row and column become the
        largest u on them, and never less than they were.
        """
        for group in self.param_groups:
            deltas = group.get("deltas") or [None] * len(group["params"])
            for p, delta in zip(group["params"], deltas, strict=True):
                if p.grad is None:
                    continue
                (d_out, d_in), places = _places(p, delta)
                state, g = self.state[p], p.grad.view(-1)
                if "row" not in state:
                    state["row"] = torch.zeros(d_out, device=p.device)
                    state["column"] = torch.zeros(d_in, device=p.device)
                r, c = places // d_in, places % d_in
                u = torch.minimum(state["row"][r], state["column"][c]) + g**2
                state["row"].scatter_reduce_(0, r, u, "amax")
                state["column"].scatter_reduce_(0, c, u, "amax")
                update = g / (u + self.EPS).sqrt_()
                p.sub_(update.view_as(p), alpha=group["lr"])
                p.mul_(1 - group["lr"] * group["weight_decay"])


def _places(p: nn.Parameter, delta: SparseDelta | None) -> tuple[tuple[int, int], Tensor]:
    """The matrix (O, I) that `p` is of, and where in it its numbers are."""
    if delta is not None:
        return delta.shape, delta.indices.long()
    rows = p.shape[0] if p.ndim else 1
    return (rows, p.numel() // rows), torch.arange(p.numel(), device=p.device)
