"""From the `dataset` settings to its sources, each with its place and its own settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from peftcli.data import embedded
from peftcli.data.formats import FORMATS, Reader, detect
from peftcli.data.records import Record
from peftcli.data.sources import Embedded, Place, check_keys, locate
from peftcli.errors import ConfigError
from peftcli.settings import Dataset, Source, Task


class Part(NamedTuple):
    """One source: where it is, what is held out from elsewhere, and how its rows are read."""

    cfg: Dataset
    place: Place
    held_out: Place | None
    weight: float


def find_parts(cfg: Dataset, task: Task, cache_dir: Path) -> list[Part]:
    """The sources with their own settings."""
    if (cfg.path is None) == (not cfg.mixture):
        given = "neither" if cfg.path is None else "both"
        raise ConfigError(
            f"Give dataset.path or dataset.mixture, not {given}. Embedded sets are "
            f"{', '.join(embedded.NAMES)}."
        )
    if cfg.path is not None:
        part = _part(cfg, task, 1.0, cache_dir)
        check_keys(cfg, part.place)
        return [part]
    if cfg.eval_path is not None:
        raise ConfigError(
            "dataset.eval_path goes with dataset.path. A mixture holds out a part of each source."
        )
    own = [_of_source(cfg, source) for source in cfg.mixture]
    return [_part(c, task, s.weight, cache_dir) for c, s in zip(own, cfg.mixture, strict=True)]


def _of_source(cfg: Dataset, source: Source) -> Dataset:
    """The group's settings with what one source says itself."""
    return replace(
        cfg,
        path=source.path,
        mixture=(),
        name=source.name or cfg.name,
        split=source.split or cfg.split,
        format=cfg.format if source.format == "auto" else source.format,
        columns=source.columns or cfg.columns,
    )


def _part(cfg: Dataset, task: Task, weight: float, cache_dir: Path) -> Part:
    assert cfg.path is not None
    place = locate(cfg.path, cfg, cfg.split, cache_dir)
    return Part(_completed(cfg, task), place, _held_out_place(cfg, place, cache_dir), weight)


def _held_out_place(cfg: Dataset, place: Place, cache_dir: Path) -> Place | None:
    """Where held-out rows come from, if from elsewhere."""
    assert cfg.path is not None
    if cfg.eval_path is None and cfg.eval_split is None:
        return None
    path = cfg.eval_path or cfg.path
    other = cfg if path == cfg.path else replace(cfg, name=None, revision=None)
    held_out = locate(path, other, cfg.eval_split or cfg.split, cache_dir)
    if held_out == place:
        key = "eval_split" if cfg.eval_path is None else "eval_path"
        raise ConfigError(
            f"dataset.{key}={getattr(cfg, key)!r} names the training examples themselves "
            f"({cfg.path} has no such split). Name others, or remove it and hold out a part by "
            "dataset.eval_samples or dataset.eval_fraction."
        )
    return held_out


def _completed(cfg: Dataset, task: Task) -> Dataset:
    """What embedded sets imply; and a format that the task can use, or auto."""
    if cfg.format not in ("auto", *FORMATS[task]):
        raise ConfigError(
            f"dataset.format={cfg.format} does not go with the task {task}, which takes auto, "
            f"{', '.join(FORMATS[task])}."
        )
    return embedded.complete(cfg, task) if cfg.path in embedded.NAMES else cfg


def read_records(part: Part, place: Place, task: Task) -> tuple[list[Record], int, str]:
    """All records of a place, the number of unclear embedded rows left out, and their format."""
    cfg, rows = part.cfg, place.read()
    all_rows = len(rows)
    if isinstance(place, Embedded) and cfg.format not in ("regression", "text"):
        rows = [row for row in rows if row["label"] is not None]
    format_ = detect(rows[0], task, cfg.columns, cfg.prompt) if cfg.format == "auto" else cfg.format
    reader = Reader(format_, cfg.columns, cfg.system, cfg.prompt, cfg.choices or (), place.folder)
    return [reader.record(row) for row in rows], all_rows - len(rows), format_
