"""The tests of the GPU kernels, in a process in which Triton interprets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftcli.kernels.choice import HAS_TRITON


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
def test_the_gpu_kernels_compute_their_references_in_the_interpreter() -> None:
    folder = Path(__file__).parent / "gpu"
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-x", str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
