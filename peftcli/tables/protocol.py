"""What runs must share before their numbers may stand in one table, and what may differ.

Numbers of different prompts, masks, held-out examples, weights, lengths of training or versions
of a library differ for reasons that no method is to blame for. So runs that differ in these are
refused, unless the table shows each difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peftcli.errors import ConfigError
from peftcli.tables.runs import RunRecord

# Of these groups every key is protocol, but for those that change no number of a run.
GROUPS = ("dataset", "model", "quantization")
WITHOUT_EFFECT = (
    "dataset.num_proc",
    "dataset.packing",
    "model.architecture",
    "model.attn_implementation",
    "model.trust_remote_code",
)
OF_TRAINER = ("max_steps", "num_train_epochs", "loss", "bf16", "generate_samples")
FACTS = ("model.sha256", "dataset.sha256", "task", "dtype", "ranks")  # besides versions
# What is found out by trying: these may differ between the rows of a table and inside a cell.
TUNED_GROUPS = ("method", "optimizer", "scheduler")
TUNED_OF_TRAINER = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_grad_norm",
)


def is_protocol(key: str) -> bool:
    """Whether a key of the configuration must be equal, or shown."""
    group, _, rest = key.partition(".")
    if group == "trainer":
        return rest in OF_TRAINER
    return group in GROUPS and rest not in ("", "_target_") and not key.startswith(WITHOUT_EFFECT)


def is_tuned(key: str) -> bool:
    """Whether a key of the configuration is one that is searched for its best value."""
    group, _, rest = key.partition(".")
    if group == "trainer":
        return rest in TUNED_OF_TRAINER
    return group in TUNED_GROUPS and rest != "_target_"


def explains(key: str) -> bool:
    """Whether a table that shows this key shows a difference of the protocol: its keys, the words
    of its groups, and facts do.
    """
    return is_protocol(key) or key in (*GROUPS, *FACTS) or key.startswith("versions.")


def facts(run: RunRecord) -> dict[str, Any]:
    """What a run's record says of its circumstances, by names that read like keys."""
    meta = run.meta_info
    if not meta:
        return {}
    of_model, of_data = meta.get("model") or {}, meta.get("dataset") or {}
    found = (of_model.get("sha256"), of_data.get("sha256"), *map(meta.get, FACTS[2:]))
    found = dict(zip(FACTS, found, strict=True))
    found["ranks"] = found["ranks"] or 1  # before runs could have several, none said so
    return found | {f"versions.{k}": v for k, v in meta.get("package_info", {}).items()}


def value(run: RunRecord, key: str) -> Any:
    """A run's value of a key or of a fact; None where it has neither."""
    return run.keys[key] if key in run.keys else facts(run).get(key)


def same(value: Any) -> str:
    """Text that is equal for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


@dataclass(frozen=True)
class Difference:
    """A key or fact that runs do not share, and how many runs have each value."""

    key: str
    values: tuple[tuple[Any, int], ...]

    def __str__(self) -> str:
        listed = ", ".join(f"{short(v)} ({n} run{'s' if n > 1 else ''})" for v, n in self.values)
        return f"{self.key}: {listed}"


def short(value: Any) -> str:
    """A value in a message: long text and hashes are cut."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 40 else f"{text[:12]}..."


def differences(runs: Iterable[RunRecord], shown: Sequence[str]) -> list[Difference]:
    """What the protocols of `runs` differ in beyond what the keys `shown` explain: inside a group
    of runs that agree in the shown keys of the protocol, nothing of it may differ.
    """
    explaining = [key for key in shown if explains(key)]
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(same([value(run, key) for key in explaining]), []).append(run)
    found: dict[str, dict[str, tuple[Any, int]]] = {}
    for group in groups.values():
        for key, counted in _counts(group).items():
            if len(counted) > 1:
                of_key = found.setdefault(key, {})
                for text, (given, count) in counted.items():
                    of_key[text] = (given, count + of_key.get(text, (given, 0))[1])
    return [Difference(key, tuple(counted.values())) for key, counted in sorted(found.items())]


def _counts(runs: Iterable[RunRecord]) -> dict[str, dict[str, tuple[Any, int]]]:
    """Of each key and fact of the protocol, the values that runs have and how many have them; what
    a run has no record of says nothing.
    """
    counts: dict[str, dict[str, tuple[Any, int]]] = {}
    for run in runs:
        protocol = {k: v for k, v in run.keys.items() if is_protocol(k)} | facts(run)
        for key, given in protocol.items():
            of_key = counts.setdefault(key, {})
            of_key[same(given)] = (given, 1 + of_key.get(same(given), (given, 0))[1])
    return counts


def refuse(found: Sequence[Difference], what: str = "runs") -> None:
    """Raise `ConfigError` with the differences and what to do about them, where there are any."""
    if found:
        listed = "".join(f"\n  {one}" for one in found)
        raise ConfigError(
            f"these {what} do not share one protocol, so their numbers do not compare:{listed}\n"
            "Name other folders, or a key of these in --rows or --columns, or let "
            "--show-differences make a column of each. Where some seeds only chose the values of "
            "tuned keys, name them in --tuning-seeds."
        )
