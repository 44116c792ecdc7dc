"""Triton's kernels run on CUDA, or anywhere in Triton's interpreter, which is chosen before it is
imported: see `tests/kernels/test_gpu.py`.
"""

from __future__ import annotations

import pytest
import torch

from peftcli.kernels.choice import HAS_TRITON, IS_INTERPRETED

if not (HAS_TRITON and (IS_INTERPRETED or torch.cuda.is_available())):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    """Where the kernels run here."""
    return torch.device("cpu" if IS_INTERPRETED else "cuda")
