"""What the kernels' launches have in common."""

from __future__ import annotations

from typing import Any

import torch
import triton

from peftcli.kernels.choice import IS_INTERPRETED


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **sizes: Any) -> None:
    """Run a kernel on a grid; its `constexpr` sizes are plain numbers to its caller."""
    kernel[grid](*args, **sizes)


def options() -> dict[str, Any]:
    """Precision of products: as torch's own, and float32 in the interpreter."""
    tf32 = torch.backends.cuda.matmul.allow_tf32
    return {"UPCAST": IS_INTERPRETED, "PRECISION": "tf32" if tf32 else "ieee"}


def tile(n: int) -> int:
    """A power of two that holds n, and at least 16, the least side of a product."""
    return max(16, triton.next_power_of_2(n))
