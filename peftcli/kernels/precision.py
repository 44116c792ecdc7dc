"""The type that products run in: masters of adapters are wider than what they multiply."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of `x` returns here: autocast's type where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def own_dtype(x: Tensor) -> AbstractContextManager[Any]:
    """Products inside run in the type of `x`, also under autocast, which the meta device lacks."""
    device = x.device.type
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in this type; None stays."""
    return tuple(None if t is None else t.to(dtype) for t in tensors)
