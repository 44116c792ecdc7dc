"""Slurm's names for the processes of a step."""

from __future__ import annotations

import pytest

from peftcli.dist import slurm

STEP = {
    "SLURM_JOB_ID": "1020304",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[03-07,11],login1",
}


def test_a_task_of_a_step_is_a_rank() -> None:
    environ = dict(STEP)
    slurm.translate(environ)
    assert {name: environ[name] for name in environ.keys() - STEP.keys()} == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "20304",
    }


def test_a_task_that_sees_one_gpu_takes_that() -> None:
    environ = {**STEP, "CUDA_VISIBLE_DEVICES": "3"}
    slurm.translate(environ)
    assert environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    "changes", [{"SLURM_STEP_ID": None}, {"SLURM_NTASKS": "1"}, {"RANK": "0"}], ids=str
)
def test_batch_scripts_single_tasks_and_ranks_are_left_alone(
    changes: dict[str, str | None],
) -> None:
    environ = {k: v for k, v in {**STEP, **changes}.items() if v is not None}
    before = dict(environ)
    slurm.translate(environ)
    assert environ == before
