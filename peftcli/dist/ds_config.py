"""A user's DeepSpeed JSON file: what it says must be what the run's own keys say, and what it tells
DeepSpeed of partitioned parameters is passed on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftcli.errors import ConfigError, did_you_mean
from peftcli.settings import DeepSpeed, Run

PASSED_ON = (  # of `zero_optimization`, to DeepSpeed in stage 3
    "overlap_comm",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
)
# How DeepSpeed's engine sums, steps and reports, which the loop does here: without effect.
UNUSED = {
    "zero_optimization": (
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "stage3_gather_16bit_weights_on_model_save",
        "sub_group_size",
    ),
    "": ("steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer"),
}
NUMBERS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)
KNOWN = {
    "": (*NUMBERS, *UNUSED[""], "zero_optimization", "bf16", "fp16", "optimizer", "scheduler"),
    "zero_optimization": (
        *("stage", "offload_optimizer", "offload_param"),
        *(*PASSED_ON, *UNUSED["zero_optimization"]),
    ),
    "bf16": ("enabled",),
    "optimizer": ("type", "params"),
    "optimizer.params": None,  # those of its class
}
AUTO = "auto"


def read(settings: DeepSpeed) -> dict[str, Any]:
    """The file's keys; none without a file. Raises `ConfigError` where it cannot be read."""
    if settings.config is None:
        return {}
    try:
        found = json.loads(Path(settings.config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise ConfigError(
            f"strategy.config={settings.config}: cannot be read ({reason})."
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"strategy.config={settings.config}: holds no mapping of keys.")
    return found


def of_partitions(settings: DeepSpeed) -> dict[str, Any]:
    """What DeepSpeed is told in stage 3."""
    given = read(settings).get("zero_optimization", {})
    zero = {k: given[k] for k in PASSED_ON if given.get(k, AUTO) != AUTO}
    if settings.offload == "parameters":
        pin = {k: v for k, v in given.get("offload_param", {}).items() if k == "pin_memory"}
        zero["offload_param"] = {"device": "cpu", **pin}
    # of the batch DeepSpeed wants to know something, and uses nothing
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **zero}}


def check(run: Run) -> None:
    """Raises `ConfigError` where the file says what is unknown here, or not what the keys say."""
    settings = run.strategy
    assert isinstance(settings, DeepSpeed)
    if settings.offload == "parameters" and settings.zero_stage < 3:
        raise ConfigError(
            f"strategy.offload=parameters: in strategy.zero_stage={settings.zero_stage} every "
            "process has all weights. Use strategy.zero_stage=3, or strategy.offload=optimizer."
        )
    given = read(settings)
    try:
        wrong = [*_unknown(given), *_contradictions(run, given)]
    except ConfigError as e:  # a section that is none
        wrong = [str(e)]
    if wrong:
        raise ConfigError("\n".join(f"strategy.config={settings.config}: {w}" for w in wrong))


def unused(settings: DeepSpeed) -> list[str]:
    """Keys of the file that have no effect here."""
    given = read(settings)
    return [
        f"{section}.{key}".lstrip(".")
        for section, keys in UNUSED.items()
        for key in _part(given, section)
        if key in keys
    ]


def _part(given: dict[str, Any], section: str) -> dict[str, Any]:
    """A section of the file by its dotted name."""
    part: Any = given
    for name in filter(None, section.split(".")):
        part = part.get(name, {})
        if not isinstance(part, dict):
            raise ConfigError(f"{section}={json.dumps(part)}: takes a mapping of keys.")
    return part


def _unknown(given: dict[str, Any]) -> Iterator[str]:
    for section, keys in KNOWN.items():
        for key in _part(given, section):
            if keys is not None and key not in keys:
                near = did_you_mean(key, keys)
                yield f"no key {f'{section}.{key}'.lstrip('.')!r} is understood here.{near}"
    if "scheduler" in given:
        yield "scheduler: is the group scheduler here; take it out of the file."
    if _part(given, "fp16").get("enabled", False) not in (False, AUTO):
        yield "fp16: nothing is trained in float16 here; take it out, and use trainer.bf16."


def _contradictions(run: Run, given: dict[str, Any]) -> Iterator[str]:
    """What the file and the keys say differently, with the names of both."""
    for key, theirs, ours, value in _pairs(run, given):
        if theirs not in (AUTO, None) and theirs != value:
            yield f"{key}={json.dumps(theirs)}, but {ours}={json.dumps(value)}. Make them equal."


def _pairs(run: Run, given: dict[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    """(key of the file, its value, our key, its value)."""
    trainer, settings = run.trainer, run.strategy
    assert isinstance(settings, DeepSpeed)
    each, times = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
    numbers = {
        "train_micro_batch_size_per_gpu": ("trainer.per_device_train_batch_size", each),
        "gradient_accumulation_steps": ("trainer.gradient_accumulation_steps", times),
        "gradient_clipping": ("trainer.max_grad_norm", trainer.max_grad_norm or 0.0),
    }
    for key, (ours, value) in numbers.items():
        yield key, given.get(key), ours, value
    if run.launch.num_processes != AUTO:
        ours = (
            "trainer.per_device_train_batch_size * trainer.gradient_accumulation_steps * "
            "launch.num_processes * launch.nnodes"
        )
        size = each * times * run.launch.num_processes * run.launch.nnodes
        yield "train_batch_size", given.get("train_batch_size"), ours, size
    if trainer.bf16 != AUTO:
        yield "bf16.enabled", _part(given, "bf16").get("enabled"), "trainer.bf16", trainer.bf16
    zero = _part(given, "zero_optimization")
    yield "zero_optimization.stage", zero.get("stage"), "strategy.zero_stage", settings.zero_stage
    places = {
        "offload_optimizer": "none" if settings.offload == "none" else "cpu",
        "offload_param": "cpu" if settings.offload == "parameters" else "none",
    }
    for key, ours in places.items():
        device = _part(zero, key).get("device", "none")
        if key in zero and device != ours:
            yield f"zero_optimization.{key}.device", device, "strategy.offload", settings.offload
    yield from _optimizer_pairs(run, _part(given, "optimizer"))


def _optimizer_pairs(run: Run, given: dict[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    """Its class by the last part of the name, and its numbers."""
    ours = run.optimizer
    yield "optimizer.type", given.get("type"), "optimizer", ours.cls.rpartition(".")[2]
    held = {"lr": ours.lr, "weight_decay": ours.weight_decay, **ours.kwargs}
    for key, theirs in _part(given, "params").items():
        yield f"optimizer.params.{key}", theirs, f"optimizer.{key}", held.get(key)
