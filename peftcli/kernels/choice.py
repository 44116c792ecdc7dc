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

from peftcli.errors import ConfigError
from peftcli.settings import Kernels

HAS_TRITON = find_spec("triton") is not None
IS_INTERPRETED = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton's kernels run on the CPU, slowly

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


def takes_triton(operation: str, device: torch.device, unfit: str | None = None) -> bool:
    """Whether the operation runs as its GPU kernel on the device; `unfit` says why its operands do
    not suit that. Raises `ConfigError` under `require` where it does not.
    """
    if _chosen == "reference":
        return False
    reason = _missing(device) or unfit
    if reason and _chosen == "require":
        raise ConfigError(
            f"trainer.kernels=require: {operation} cannot run as its GPU kernel: {reason}. Take "
            "trainer.kernels=auto."
        )
    return reason is None


def _missing(device: torch.device) -> str | None:
    """What GPU kernels lack here."""
    if not HAS_TRITON:
        return "triton is not installed (pip install 'peftcli[triton]')"
    if device.type != "cuda" and not IS_INTERPRETED:
        return f"they need a CUDA device, and this run is on the {device.type.upper()}"
    return None
