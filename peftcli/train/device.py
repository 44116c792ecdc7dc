"""The device of this process: what it is, what it multiplies fast, what memory it has."""

from __future__ import annotations

import ctypes
import os
import resource
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


def pick(index: int = 0) -> torch.device:
    """The CUDA device of this number, which becomes the process's own; without any, the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def current() -> torch.device:
    """The device of this process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware; where they are emulated they are slower than
    float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def describe(device: torch.device) -> str:
    """One line for the screen and the record."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    fast = "bfloat16 in hardware" if multiplies_bf16(device) else "no bfloat16 in hardware"
    return f"CPU, {torch.get_num_threads()} threads, {fast}"


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: allocated on the GPU, resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory() -> int:
    """Bytes of this process that are in the CPU's memory now."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * resource.getpagesize()


def release_freed() -> None:
    """Give the system back what the C library keeps of freed memory."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # of glibc
        libc.malloc_trim(0)


def growth(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the CPU's memory that `work` takes: at most at a time, and for good."""
    release_freed()
    before = resident_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again here
    work()
    peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    release_freed()
    return peak - before, resident_memory() - before


def make_resident(tensors: Iterable[torch.Tensor]) -> None:
    """Read one number of every page: weights that lie mapped in a file take memory only then, and
    would be taken for what the first step needs.
    """
    for tensor in tensors:
        if tensor.device.type == "cpu":
            stride = resource.getpagesize() // tensor.element_size()
            tensor.detach().reshape(-1)[::stride].sum()


def available_memory(device: torch.device) -> int:
    """Bytes that may still be taken."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as f:
        fields = dict(line.split(":", 1) for line in f)
    return int(fields["MemAvailable"].split()[0]) * 1024


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a middling matrix product, measured in a few hundredths of a second."""
    a, b = (torch.ones(512, 1024, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        (a @ b.T).sum().item()
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 512 * 1024 / best
