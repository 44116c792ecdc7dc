"""What trains, divided among ranks: each steps its own rows of a tensor and keeps their part of the
optimizer's state (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", arXiv 1910.02054).

Methods and checkpoints see every tensor whole; only the optimizer sees rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcli.dist.ranks import Ranks


def is_matrix(tensor: Tensor) -> bool:
    """Whether it is worth dividing: vectors are small, and methods look at their gradients."""
    return sum(n > 1 for n in tensor.shape) > 1


class Share:
    """This rank's rows of a parameter of the model: `own`, which the optimizer steps. The parameter
    itself is whole, and so is its gradient until `take`. Rows and optimizer state lie on `device`.
    """

    reduces = False  # whether gradients are summed over the ranks on their way here
    is_whole = True  # whether the model has the parameter whole
    copies = False  # whether the rows lie beside those of the parameter on the same device, too

    def __init__(self, parameter: nn.Parameter, ranks: Ranks, device: torch.device) -> None:
        self.parameter, self.ranks, self.shape = parameter, ranks, parameter.shape
        self.device = device
        self.own = nn.Parameter(self._rows(parameter.detach()).to(device, copy=self.copies))

    def _rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of the parameter or of its gradient."""
        return self.ranks.rows(whole)

    def part(self, whole: Tensor) -> Tensor:
        """This rank's rows of a tensor that every rank has whole."""
        return self.ranks.rows(whole).to(self.device)

    def whole(self, rows: Tensor | None = None) -> Tensor:
        """The parameter, or the tensor whose `rows` lie as those of `own`; from all ranks."""
        rows = (self.own if rows is None else rows).detach().to(self.parameter.device)
        joined = rows.new_empty(self.shape)
        self.ranks.join_([joined], [rows])
        return joined

    def take(self) -> None:
        """Move the step's gradient here."""
        if (grad := self.parameter.grad) is not None:
            self.own.grad = self._rows(grad).to(self.device)
            self.parameter.grad = None

    def settle(self) -> None:
        """Put what was stepped back into the model, where the parameter is not whole there."""


class ReducedShare(Share):
    """As `Share`, but a gradient is summed into the ranks' rows as soon as it exists, and is kept
    whole nowhere.
    """

    reduces = True

    def __init__(self, parameter: nn.Parameter, ranks: Ranks, device: torch.device) -> None:
        super().__init__(parameter, ranks, device)
        parameter.register_post_accumulate_grad_hook(self._reduce)

    @torch.no_grad()
    def _reduce(self, parameter: Tensor) -> None:
        rows = self.ranks.sum_rows(cast(Tensor, parameter.grad)).to(self.device)
        self.own.grad = rows if self.own.grad is None else self.own.grad + rows
        parameter.grad = None


class CutShare(Share):
    """Of a parameter that FSDP2 has cut up: the rows that it keeps here, and sums gradients for."""

    reduces, is_whole = True, False

    def _rows(self, whole: Tensor) -> Tensor:
        return cast(Any, whole).to_local()

    @torch.no_grad()
    def settle(self) -> None:
        """Copy the rows back where they are kept twice."""
        rows = self._rows(self.parameter.detach())
        if rows.data_ptr() != self.own.data_ptr():
            rows.copy_(self.own)


@torch.no_grad()
def settle(shares: Iterable[Share], ranks: Ranks) -> None:
    """Put what was stepped back into the model: what is whole there in few messages."""
    shares = list(shares)
    for share in shares:
        share.settle()
    whole = [share for share in shares if share.is_whole]
    rows = [share.own.to(share.parameter.device) for share in whole]
    ranks.join_((share.parameter for share in whole), rows)
