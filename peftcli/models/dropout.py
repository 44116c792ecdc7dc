"""Dropout of the base model itself, on the CPU."""

from __future__ import annotations

from torch import Tensor, nn

from peftcli.kernels.dropout import dropout


class _Dropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p) if self.training else input


_Dropout.__name__ = _Dropout.__qualname__ = "Dropout"


def use_masks(model: nn.Module) -> None:
    """Have every dropout of the model draw as `kernels.dropout` does: torch's own takes a fifth of
    a step of MiniLM.
    """
    for module in model.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = _Dropout
