"""result.json: one record a run, in the layout of HF peft's method comparison, with what else a
fair table needs.
"""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from typing import Any

from omegaconf import DictConfig, OmegaConf

from peftcli import written
from peftcli.build import Parts
from peftcli.models.source import cache_dir, fingerprint
from peftcli.train import device, objective
from peftcli.train.plan import Progress
from peftcli.versions import versions


def make_result(
    parts: Parts,
    cfg: DictConfig,
    progress: Progress,
    started: datetime,
    first_step: float | None,
    file_size: int,
    first_hash: str,
) -> dict[str, Any]:
    """Everything about a finished run that a reader may ask for."""
    trained, total = parts.host.num_parameters()
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    return {
        "run_info": {
            "created_at": started.isoformat(timespec="seconds"),
            "total_time": (datetime.now(UTC) - started).total_seconds(),
            "experiment_name": parts.run.name,
            "seed": parts.run.seed,
            "train_config": config,
            "peft_config": config["method"],
        },
        "train_info": {
            "status": "success",
            "metrics": {"before": progress.first, "after": progress.last, "best": progress.best},
            "loss_is": objective.describe(parts.task, parts.run.trainer.loss)["loss"],
            "steps": progress.step,
            "train_time": progress.seconds,
            "tokens": progress.tokens,
            "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
            "time_to_first_step": first_step,
            "peak_memory": device.peak_memory(parts.device),
            "file_size": file_size,
            "optimizer_bytes": trained * 8,
            "num_trainable_params": trained,
            "num_total_params": total,
        },
        "meta_info": {
            "model": {
                "name": parts.source.name,
                "kind": parts.source.kind,
                "sha256": fingerprint(parts.source, cache_dir()),
            },
            "dataset": {"key": parts.data.key, "sha256": parts.data.hash, **parts.data.stats}
            if parts.data
            else None,
            "config_sha256": written.digest(config),
            "task": parts.task,
            "packing": parts.packing,
            "dtype": str(parts.dtype).removeprefix("torch."),
            "liger": parts.liger,
            "sites": {s.name: s.role for sites in parts.host.sites.values() for s in sites},
            "matched": parts.host.matched["default"],
            "state_before_sha256": first_hash,
            "ranks": parts.strategy.ranks.size,
            "package_info": versions(),
            "system_info": {
                "platform": platform.platform(),
                "python": platform.python_version(),
                "device": device.describe(parts.device),
            },
        },
    }
