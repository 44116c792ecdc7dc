"""Processes that `srun` started: Slurm's names for them, as torchrun says them.

Nothing heavy is imported: the command line asks before it does anything else.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

# First, and how many: where the ranks of a step meet, by the numbers of its job and its own; below
# those that systems give away themselves (Linux: from 32768).
PORTS = (20_000, 12_000)
STEPS = 1_009  # ports between two steps of a job, so that they are seldom those of its neighbours


def translate(environ: MutableMapping[str, str]) -> None:
    """Give a task of a Slurm step the names that torchrun gives a rank, but for those that are
    there. Who is alone in a step is no rank, nor is a batch script or a shell of `salloc`, which
    are in no step: the tasks that they name (`SLURM_NTASKS`) are those that `srun` would start.
    """
    number, size = environ.get("SLURM_PROCID"), environ.get("SLURM_STEP_NUM_TASKS", "1")
    if number is None or size == "1" or "RANK" in environ:
        return
    sees_one_gpu = environ.get("CUDA_VISIBLE_DEVICES", "").isdigit()  # that is its own
    local = "0" if sees_one_gpu else environ.get("SLURM_LOCALID", number)
    job, step = (int(environ.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    is_one_node = environ.get("SLURM_STEP_NUM_NODES") == "1"  # which need not know its own name
    nodes = "localhost" if is_one_node else environ.get("SLURM_STEP_NODELIST", "localhost")
    names = {
        "RANK": number,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": str(_on_this_node(environ, int(size))),
        "MASTER_ADDR": _first_host(nodes),
        "MASTER_PORT": str(PORTS[0] + (job + STEPS * step) % PORTS[1]),
    }
    for name, value in names.items():
        environ.setdefault(name, value)


def _on_this_node(environ: MutableMapping[str, str], size: int) -> int:
    """Tasks on this node: '4(x2),3' are 4 on the first two and 3 on the next."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", str(size)).split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[int(environ.get("SLURM_NODEID", "0"))]


def _first_host(nodes: str) -> str:
    """Of Slurm's short form: gpu[03-07,11],login1 begins with gpu03."""
    found = re.match(r"([^\[,]+)(?:\[([^\-,\]]+))?", nodes)
    assert found is not None, nodes
    return found[1] + (found[2] or "")
