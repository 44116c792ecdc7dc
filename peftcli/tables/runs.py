"""Run folders, read: the configuration, the result and the curves of each run, finished or not.

What is read: a run folder (config.yaml, result.json, metrics.jsonl), a sweep folder (sweep.json,
members/<id>/ with member.json), or a folder somewhere above such.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from peftcli.errors import ConfigError, DataError, did_you_mean
from peftcli.folders import shown
from peftcli.train.folder import read_json
from peftcli.written import filled, flat

CONFIG, RESULT, MEMBER, SWEEP = "config.yaml", "result.json", "member.json", "sweep.json"
INSIDE = {".hydra", "adapter", "adapter-best", "checkpoints", "plots", "previous"}
# What a group is called by where the word of its choice was not kept.
CALLED = {
    "model": "name_or_path",
    "quantization": "name",
    "dataset": "path",
    "scheduler": "name",
    "strategy": "name",
    "logger": "name",
}
GROUP_WORDS = (*CALLED, "method", "optimizer")  # keys of a record that name a group's choice
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is: ten times as fast


@dataclass(frozen=True)
class Sweep:
    """What sweep.json says of the sweep that a run belongs to."""

    folder: Path
    line: tuple[str, ...]  # the overrides as they were given
    tuning_seeds: tuple[int, ...] = ()  # chose the values of tuned keys
    test_seeds: tuple[int, ...] = ()  # are reported


@dataclass(frozen=True)
class RunRecord:
    """One run, as its folder tells it.

    `keys` are the configuration's by their dotted names (`optimizer.lr`), those that the run's
    version did not have yet at their defaults, and beside them one word a group (`method`: lora).
    `state`: done, or waiting, running, failed, stopped (as the sweep says), or unfinished.
    """

    folder: Path
    keys: Mapping[str, Any]
    state: str = "done"
    reason: str | None = None  # why it is not done, in one line
    result: Mapping[str, Any] = field(default_factory=dict)  # result.json; empty until done
    overrides: tuple[str, ...] = ()  # of a sweep's member
    sweep: Sweep | None = None

    @property
    def name(self) -> str:
        """The folder as the user would type it."""
        return shown(self.folder)

    @property
    def seed(self) -> int | None:
        """The run's seed; None where it is not known."""
        return self.keys.get("seed")

    @property
    def train_info(self) -> Mapping[str, Any]:
        """Numbers of the training: metrics, parameters, memory, time."""
        return self.result.get("train_info", {})

    @property
    def meta_info(self) -> Mapping[str, Any]:
        """What the numbers came from: hashes, versions, hardware."""
        return self.result.get("meta_info", {})

    @property
    def metrics(self) -> Mapping[str, float]:
        """Metrics after training, on the held-out examples."""
        return self.train_info.get("metrics", {}).get("after", {})

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, in their order; a torn last line is left out."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        try:
            return [json.loads(line) for line in lines if line.endswith("\n") and line.strip()]
        except json.JSONDecodeError as e:
            raise DataError(f"{shown(path)}: a line is no JSON ({e}).") from None


# -- Finding ---------------------------------------------------------------------------------------
def read_runs(paths: Iterable[Path]) -> list[RunRecord]:
    """The runs in all these folders, each once, by their folders' names.

    Raises `ConfigError` where a path does not exist or holds no run, `DataError` where a file of a
    run cannot be read.
    """
    found: dict[Path, RunRecord] = {}
    for path in paths:
        here = {folder.resolve(): run for folder in _folders(path) if (run := _read(folder))}
        if not here:
            raise ConfigError(f"{path}: holds no run, which is a folder with a run's {CONFIG}.")
        found |= here
    return _completed([found[folder] for folder in sorted(found)])


def read_run(path: Path) -> RunRecord:
    """The run of one folder. Raises `ConfigError` where it holds several."""
    found = read_runs([path])
    if len(found) > 1:
        raise ConfigError(f"{path}: holds {len(found)} runs; name one, such as {found[0].name}.")
    return found[0]


def _folders(path: Path) -> Iterator[Path]:
    """Run folders at or below a path."""
    if not path.is_dir():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such folder.{did_you_mean(path.name, near)}")
    for folder, below, files in os.walk(path):
        if CONFIG in files or MEMBER in files:
            below.clear()
            yield Path(folder)
        below[:] = sorted(set(below) - INSIDE)


def _completed(runs: list[RunRecord]) -> list[RunRecord]:
    """The same runs. A member that never began has only its overrides; what no override is about it
    shares with every other member of its sweep.
    """
    known = {run.sweep.folder: run for run in runs if run.sweep and "run_dir" in run.keys}
    completed = []
    for run in runs:
        if run.sweep and "run_dir" not in run.keys and run.sweep.folder in known:
            own = {key.partition(".")[0] for key in run.keys} | {"run_dir"}
            sibling = known[run.sweep.folder].keys.items()
            shared = {k: v for k, v in sibling if k.partition(".")[0] not in own}
            run = replace(run, keys=shared | dict(run.keys))
        completed.append(run)
    return completed


# -- Reading ---------------------------------------------------------------------------------------
def _read(folder: Path) -> RunRecord | None:
    """The run of a folder; None where its config.yaml is not one of a run."""
    result, member = _result(folder / RESULT), _json(folder / MEMBER)
    overrides = tuple(member.get("overrides", ()))
    config = result["run_info"]["train_config"] if result else _yaml(folder / CONFIG)
    if config and "run_dir" not in config:
        return None
    keys = flat(filled(config)) | _words(config) | _chosen(overrides, all_keys=not config)
    state = "done" if result else member.get("state", "unfinished")
    reason = member.get("reason") if member else f"no {RESULT}"
    return RunRecord(
        folder=folder,
        keys=keys,
        state="unfinished" if state == "done" and not result else state,
        reason=None if state == "done" else reason,
        result=result,
        overrides=overrides,
        sweep=_sweep(folder) if member else None,
    )


def _sweep(folder: Path) -> Sweep | None:
    """The sweep whose member a folder is."""
    top = folder.parent.parent
    said = _json(top / SWEEP)
    if not said:
        return None
    line = tuple(said.get("line", ()))
    seeds = (tuple(said.get("sweep", {}).get(f"{kind}_seeds") or ()) for kind in ("tuning", "test"))
    return Sweep(top, line, *seeds)


def _result(path: Path) -> dict[str, Any]:
    """A result.json of ours; nothing where there is none."""
    found = _json(path)
    needed = ("run_info", "train_config", "run_dir"), ("train_info", "metrics", "after")
    for keys in needed if found else ():
        inside: Any = found
        for key in keys:
            if not isinstance(inside, dict) or key not in inside:
                raise DataError(f"{shown(path)}: is no result of peft-train: no {'.'.join(keys)}.")
            inside = inside[key]
    return found


def _json(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}


def _yaml(path: Path) -> dict[str, Any]:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as e:
        raise DataError(f"{shown(path)}: cannot be read ({e}).") from None


def _words(config: Mapping[str, Any]) -> dict[str, Any]:
    """What each group is called: a method by its file, an optimizer by its class, others by the key
    that says what they are.
    """
    words = {g: config[g].get(key) for g, key in CALLED.items() if g in config}
    if "method" in config:
        words["method"] = str(config["method"].get("_target_", "")).split(".")[-2:][0]
    if "optimizer" in config:
        words["optimizer"] = str(config["optimizer"].get("_target_", "")).rpartition(".")[2]
    return words


def _chosen(overrides: Iterable[str], *, all_keys: bool) -> dict[str, Any]:
    """What a member's overrides say: the words of its groups, or all of its keys where nothing else
    does.
    """
    pairs = (word.lstrip("+").partition("=") for word in overrides if "=" in word)
    return {key: value_of(text) for key, _, text in pairs if all_keys or "." not in key}


def value_of(text: str) -> Any:
    """A value as it is typed on the command line: JSON where it is, also 1e-4; else the text."""
    for read in (json.loads, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text
