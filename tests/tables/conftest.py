"""Run folders and sweep folders in their real layout, with the numbers that a test needs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from peftcli import config

Dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
WriteRun = Callable[..., Path]
META: dict[str, Any] = {
    "model": {"name": "minilm", "kind": "package", "sha256": "5" * 64},
    "dataset": {"key": "k", "sha256": "4" * 64},
    "task": "classification",
    "dtype": "float32",
    "ranks": 1,
    "state_before_sha256": "0" * 64,
    "package_info": {"torch": "2.13.0", "transformers": "5.23.0"},
    "system_info": {"platform": "Linux", "python": "3.11", "device": "CPU, 1 threads"},
}


@pytest.fixture(scope="session")
def composed() -> Callable[[str], dict[str, Any]]:
    """The composed configuration of a method on MiniLM, made once."""
    made: dict[str, dict[str, Any]] = {}

    def of(method: str) -> dict[str, Any]:
        if method not in made:
            cfg = config.compose(["+recipe=lora_minilm", f"method={method}"])
            made[method] = OmegaConf.to_container(cfg, resolve=True)
        return copy.deepcopy(made[method])

    return of


@pytest.fixture
def write_run(tmp_path: Path, composed: Callable[[str], dict[str, Any]]) -> WriteRun:
    """`write_run("runs/a", method="lora", accuracy=0.9, seed=1, **{"optimizer.lr": 1e-3})`; without
    a metric the run is not done; `meta` overrides what result.json says of circumstances.
    """

    def write(
        name: str,
        accuracy: float | None = None,
        /,
        *,
        method: str = "lora",
        meta: dict[str, Any] | None = None,
        losses: tuple[float, ...] = (),
        **keys: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        values = composed(method) | {"run_dir": str(folder)}
        for key, value in keys.items():
            group, _, last = key.rpartition(".")
            (values[group] if group else values)[last] = value
        (folder / "config.yaml").write_text(yaml.dump(values, Dumper=Dumper))
        if accuracy is not None:
            result = _result(values, accuracy, META | (meta or {}))
            (folder / "result.json").write_text(json.dumps(result))
        lines = [{"step": i + 1, "loss": v, "wall": {"seconds": i}} for i, v in enumerate(losses)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return folder

    return write


def _result(values: dict[str, Any], accuracy: float, meta: dict[str, Any]) -> dict[str, Any]:
    metrics = {"loss": 1 - accuracy, "accuracy": accuracy}
    best = {"step": 10, "metric": "accuracy", "value": accuracy}
    return {
        "run_info": {"created_at": "2026-01-01T00:00:00", "seed": 0, "train_config": values},
        "train_info": {
            "metrics": {"before": {}, "after": metrics, "best": best},
            "steps": 10,
            "train_time": 12.5,
            "tokens_per_second": 1000.0,
            "peak_memory": 2**30,
            "file_size": 2**20,
            "optimizer_bytes": 2**21,
            "num_trainable_params": 1000 if "lora" in values["method"]["_target_"] else 2000,
        },
        "meta_info": meta,
    }


@pytest.fixture
def write_sweep(tmp_path: Path, write_run: WriteRun) -> Callable[..., Path]:
    """`write_sweep([(["method=lora", "seed=0"], "done", 0.9), ...])`: members that are not done
    have member.json alone.
    """

    def write(
        members: list[tuple[list[str], str, float | None]],
        line: list[str],
        settings: dict[str, Any] | None = None,
    ) -> Path:
        top = tmp_path / "sweep"
        for i, (overrides, state, accuracy) in enumerate(members):
            folder = top / "members" / f"{i:012x}"
            if accuracy is not None:
                keys = dict(word.split("=") for word in overrides)
                method = keys.pop("method", "lora")
                write_run(
                    str(folder.relative_to(tmp_path)),
                    accuracy,
                    method=method,
                    **{key: yaml.safe_load(value) for key, value in keys.items()},
                )
            folder.mkdir(parents=True, exist_ok=True)
            member = {"id": folder.name, "overrides": overrides, "state": state, "attempts": 1}
            reason = "out of memory" if state == "failed" else None
            member |= {"exit_code": 4 if reason else None, "reason": reason, "seconds": None}
            (folder / "member.json").write_text(json.dumps(member))
        head = {"line": line, "keys": ["method", "seed"], "sweep": settings or {}}
        (top / "sweep.json").write_text(json.dumps(head))
        return top

    return write
