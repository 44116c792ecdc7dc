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
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[03-07,11],login1",
}
# as Slurm 22.05 sets them
SCRIPT = {  # sbatch --ntasks 2
    "SLURM_JOB_ID": "3",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_NPROCS": "2",
    "SLURM_TASKS_PER_NODE": "2",
}
ALONE = {  # srun --ntasks 1 in it
    **SCRIPT,
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_STEP_NODELIST": "node1",
}
SHELL = {  # salloc --ntasks 2, where it opens a shell on the node, with what a script before had
    **ALONE,
    "SLURM_STEP_ID": "4294967290",
    "SLURM_NTASKS": "2",
}


def translated(**changes: str) -> dict[str, str]:
    """What is new in the environment of a task."""
    environ = STEP | changes
    slurm.translate(environ)
    return {name: environ[name] for name in environ.keys() - STEP.keys()}


def test_a_task_of_a_step_is_a_rank() -> None:
    assert translated() == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": "20304",
    }


def test_a_task_that_sees_one_gpu_takes_that() -> None:
    assert translated(CUDA_VISIBLE_DEVICES="3")["LOCAL_RANK"] == "0"


def test_ranks_on_one_node_meet_there_whatever_it_is_called() -> None:
    one_node = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "7"}
    assert translated(**one_node, SLURM_NODEID="0")["MASTER_ADDR"] == "localhost"


def test_steps_of_a_job_at_the_same_time_meet_at_ports_of_their_own() -> None:
    ports = {int(translated(SLURM_STEP_ID=str(n))["MASTER_PORT"]) for n in range(8)}
    assert len(ports) == 8
    assert max(ports) < 32768  # from there on, any process may have it


@pytest.mark.parametrize(
    "environ",
    [SCRIPT, ALONE, SHELL, {**STEP, "RANK": "0"}],
    ids=["sbatch", "srun", "salloc", "rank"],
)
def test_batch_scripts_single_tasks_shells_and_ranks_are_left_alone(
    environ: dict[str, str],
) -> None:
    before = dict(environ)
    slurm.translate(environ)
    assert environ == before
