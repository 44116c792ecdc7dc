"""What a launcher tells its processes, ours or another: which rank this one is, and of how many."""

from __future__ import annotations

import os

from omegaconf import DictConfig


def is_rank() -> bool:
    """Whether this process was started as one of several: by our launcher or by another."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank_in_environment() -> int:
    """This process's rank; 0 where it is alone."""
    return int(os.environ["RANK"]) if is_rank() else 0


def local_rank() -> int:
    """This process's number on its node, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if is_rank() else 0


def num_local_ranks() -> int:
    """Processes of the run on this node, which share its cores."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")  # the second is of DeepSpeed's launcher
    found = next((os.environ[name] for name in names if name in os.environ), "1")
    return int(found) if is_rank() else 1


def with_numbers(cfg: DictConfig) -> DictConfig:
    """The configuration with the number of ranks that there are, in place of `auto`."""
    if is_rank():
        cfg = cfg.copy()
        cfg.launch.num_processes = num_local_ranks()
        cfg.launch.nnodes = int(os.environ["WORLD_SIZE"]) // num_local_ranks()
    return cfg
