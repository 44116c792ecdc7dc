"""Which form of an operation runs: the fastest here, the plain equation, or its GPU kernel alone.

    auto        Triton on CUDA, where it is installed and an operation has a kernel for its
                operands; else the fast torch path
    reference   the equation in plain torch, `<operation>_ref`
    require     as auto, but an operation that has a GPU kernel and would not run as it is an error

It is one setting of the process, `trainer.kernels`: a run makes it before its model is built, and
the operations ask here and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from peftcli.errors import ConfigError
from peftcli.settings import Kernels

HAS_TRITON = find_spec("triton") is not None
IS_INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton's kernels run on the CPU, slowly
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 128  # rank, or side of a block, that one tile holds

_chosen: Kernels = "auto"


def choose(kernels: Kernels, device: torch.device) -> None:
    """Run every operation so from now on. Raises `ConfigError` where `require` cannot be kept on
    the device.
    """
    global _chosen
    if kernels == "require" and (reason := _missing(device)):
        raise ConfigError(
            f"trainer.kernels=require: {reason}. Take trainer.kernels=auto, which runs the fast "
            "torch paths here."
        )
    _chosen = kernels


@contextmanager
def using(kernels: Kernels, device: torch.device) -> Iterator[None]:
    """The same, for the length of the block."""
    global _chosen
    before = _chosen
    choose(kernels, device)
    try:
        yield
    finally:
        _chosen = before


def is_reference() -> bool:
    """Whether the plain equation is asked for."""
    return _chosen == "reference"


def is_required() -> bool:
    """Whether GPU kernels must run, or nothing."""
    return _chosen == "require"


def has_kernels(device: torch.device) -> bool:
    """Whether GPU kernels can run on the device."""
    return _missing(device) is None


def takes_triton(operation: str, *operands: Tensor, side: int = 0) -> bool:
    """Whether the operation runs as its GPU kernel on the operands, of which a tile must hold a
    `side`. Raises `ConfigError` under `require` where it does not.
    """
    if is_reference():
        return False
    dtype, fits = operands[0].dtype, side <= WIDEST
    fits = fits and dtype in DTYPES and all(t.dtype == dtype for t in operands)
    if fits and has_kernels(operands[0].device):
        return True
    if is_required():
        kinds = ", ".join(sorted({str(t.dtype) for t in operands}))
        raise ConfigError(
            f"trainer.kernels=require: {operation} has no GPU kernel for {kinds} on "
            f"{operands[0].device} with a rank or block of {side}; they take one type of 16 or 32 "
            f"bits, and at most {WIDEST}. Take trainer.kernels=auto."
        )
    return False


def _missing(device: torch.device) -> str | None:
    """What GPU kernels lack here."""
    if not HAS_TRITON:
        return "triton is not installed (pip install 'peftcli[triton]')"
    if device.type != "cuda" and not IS_INTERPRETED:
        return "they need a CUDA device, and there is none"
    return None
