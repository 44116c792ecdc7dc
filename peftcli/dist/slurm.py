"""Processes that `srun` started: Slurm's names for them, as torchrun says them.

Nothing heavy is imported: the command line asks before it does anything else.
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping

PORTS = (20_000, 20_000)  # first, and how many: where the ranks of a job meet, by its number


def translate(environ: MutableMapping[str, str]) -> None:
    """Give a task of a Slurm step the names that torchrun gives a rank, but for those that are
    there. A batch script, which is in a job and in no step, is no rank.
    """
    in_script = "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ
    number, size = environ.get("SLURM_PROCID"), environ.get("SLURM_NTASKS", "1")
    if number is None or size == "1" or in_script or "RANK" in environ:
        return
    sees_one_gpu = environ.get("CUDA_VISIBLE_DEVICES", "").isdigit()  # that is its own
    local = "0" if sees_one_gpu else environ.get("SLURM_LOCALID", number)
    job = int(environ.get("SLURM_JOB_ID", "0"))
    names = {
        "RANK": number,
        "WORLD_SIZE": size,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": str(_on_this_node(environ, int(size))),
        "MASTER_ADDR": _first_host(environ.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(PORTS[0] + job % PORTS[1]),
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
