"""`trainer.compile`: the transformer blocks through `torch.compile`, for training steps.

Block by block, not the whole model: blocks of one class share their code, so that it is compiled
once. The attention function stays outside: it splits packed rows by lengths that change with every
batch. So does the first block of each stack: where nothing before it trains, its input needs no
gradient, and it alone would be compiled a second time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from peftcli.models import attention
from peftcli.models.roles import Layout


def compile_blocks(
    model: nn.Module, layout: Layout, cache: Path | None = None, backend: str = "inductor"
) -> int:
    """Have every block but the first of its stack compiled when it is called next, for rows of any
    length; returns their number. What was compiled is kept in the folder `cache` for later
    processes, in torch's own format.
    """
    attention.keep_uncompiled()
    if cache is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    paths = [path for path in layout.blocks if layout.block_of(path) != 0]
    for path in paths:
        model.get_submodule(path).compile(dynamic=True, backend=backend)
    return len(paths)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled blocks run as they are for the length of the block, so that no other shapes or modes
    are compiled.
    """
    with torch.compiler.set_stance("force_eager"):
        yield
