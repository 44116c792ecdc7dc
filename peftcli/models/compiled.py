"""`trainer.compile`: each block of the model compiled by torch, for training steps alone.

Blocks share their code, so it is generated once; lengths vary, so it is generated for any. What is
not one graph for every batch, the attention of packed rows, runs as it is. Evaluation and
generation run uncompiled: they would need graphs of their own for a few passes.
"""

from __future__ import annotations

import shutil
from typing import Any

import torch

from peftcli.core.host import Host
from peftcli.errors import ConfigError


def compile_blocks(host: Host) -> int:
    """Compile the blocks in place, to be generated at their first training step; returns their
    number. Raises `ConfigError` where there is nothing to compile, or nothing to compile with.
    """
    model: Any = host.model
    if not host.layout.blocks:
        raise ConfigError(
            f"trainer.compile=true: {type(model).__name__} has no blocks that repeat; leave it off."
        )
    device = next(model.parameters()).device.type
    if device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise ConfigError("trainer.compile=true needs a C++ compiler on the CPU: install g++.")
    for path in host.layout.blocks:
        _compile(model.get_submodule(path))
    return len(host.layout.blocks)


def _compile(block: Any) -> None:
    plain = block._call_impl
    compiled = torch.compile(plain, dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        trains = block.training and torch.is_grad_enabled()
        return (compiled if trains else plain)(*args, **kwargs)

    block._compiled_call_impl = call
