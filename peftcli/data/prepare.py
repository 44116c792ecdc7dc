"""From the `dataset` settings to examples, through the cache: the one function that training and
evaluation call.

What is drawn: each source is split by itself (see `split`), then the training sides are mixed, and
the held-out sides too. The weights of a mixture are relative numbers of examples; no example is
used twice. Without `train_samples` or `eval_samples` a mixture is as large as its weights allow, so
it ends where the first source runs short; asking for more is an error that names the largest
number. Held-out examples that are not drawn are not trained on either, nor is the half of them that
`eval_part` leaves out.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from peftcli.data import cache
from peftcli.data.build import Builder
from peftcli.data.examples import Arrays, Data, Examples
from peftcli.data.parts import Part, find_parts, read_records
from peftcli.data.records import Labelled, Picture, Record, class_names
from peftcli.data.render import Renderer
from peftcli.data.split import Sides, draw, half, hold_out, shares, smallest, without
from peftcli.errors import DataError
from peftcli.settings import LABELLED, Dataset, Task

VERSION = 1  # raise it when this package makes other examples from the same input
NOT_IN_KEY = ("packing", "group_by_length", "num_proc")  # they do not change the examples
PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def prepare(
    cfg: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase | None, *, cache_dir: Path
) -> Data:
    """Examples for `task`, from the cache where they were made before; no tokenizer for images."""
    started = time.perf_counter()
    assert (tokenizer is None) == (task == "image_classification")
    parts = find_parts(cfg, task, cache_dir)
    renderer = None if tokenizer is None else Renderer(tokenizer, cfg.train_on)
    ingredients = _ingredients(cfg, task, parts, renderer)
    key = cache.key_of(ingredients)
    found = cache.load(cache_dir, key, ingredients)
    was_cached = isinstance(found, cache.Entry)
    if not was_cached:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(cache_dir / f"{key}.lock"):  # a second process waits, then finds the entry
            found = _made(cfg, task, parts, renderer, cache_dir, key, ingredients)
    assert isinstance(found, cache.Entry)
    seconds = time.perf_counter() - started
    return _data(found, task, tokenizer, key, {"cached": was_cached, "seconds": seconds})


def _data(
    entry: cache.Entry,
    task: Task,
    tokenizer: PreTrainedTokenizerBase | None,
    key: str,
    timing: dict[str, Any],
) -> Data:
    info = entry.info
    sides = {side: _of_side(entry.arrays, side) for side in ("train", "eval")}
    labels = None if info["labels"] is None else tuple(info["labels"])
    held_out = Examples(task, sides["eval"]) if sides["eval"] else None
    stats = {**info["stats"], **timing}
    return Data(
        Examples(task, sides["train"]), held_out, labels, stats, key, info["hash"], tokenizer
    )


def _of_side(arrays: Arrays, side: str) -> Arrays:
    return {
        name.removeprefix(f"{side}."): a
        for name, a in arrays.items()
        if name.startswith(f"{side}.")
    }


def _made(
    cfg: Dataset,
    task: Task,
    parts: Sequence[Part],
    renderer: Renderer | None,
    cache_dir: Path,
    key: str,
    ingredients: dict[str, Any],
) -> cache.Entry:
    """The entry, made unless another process just did."""
    found = cache.load(cache_dir, key, ingredients)
    if isinstance(found, cache.Entry):
        return found
    arrays, info = _build(cfg, task, parts, renderer)
    if isinstance(found, str):
        info["stats"]["notes"].append(f"The prepared data in {cache_dir} were made again: {found}.")
    cache.save(cache_dir, key, ingredients, arrays, info)
    again = cache.load(cache_dir, key, ingredients)
    if not isinstance(again, cache.Entry):
        raise DataError(
            f"{cache_dir}: what was just written does not read back ({again}). Is the disk full or "
            "broken?"
        )
    return again


# -- the key ---------------------------------------------------------------------------------------
def _ingredients(
    cfg: Dataset, task: Task, parts: Sequence[Part], renderer: Renderer | None
) -> dict[str, Any]:
    """Everything that the examples depend on."""
    options = {name: value for name, value in asdict(cfg).items() if name not in NOT_IN_KEY}
    return {
        "version": VERSION,
        "task": task,
        "options": options,
        "sources": [p.place.fingerprint() for p in parts],
        "held_out": [None if p.held_out is None else p.held_out.fingerprint() for p in parts],
        "folders": [str(p.place.folder.resolve()) for p in parts]
        if task == "image_classification"
        else None,
        "tokenizer": None if renderer is None else _tokenizer_hash(renderer),
    }


def _tokenizer_hash(renderer: Renderer) -> str:
    """By vocabulary and rules, what is put around a text, and the template with its rendering."""
    tokenizer = renderer.tokenizer
    told: list[Any] = [tokenizer("a b").input_ids, tokenizer.special_tokens_map]
    if renderer.has_template:
        told += [tokenizer.get_chat_template(), renderer.chat(PROBE)]
    told_hash = hashlib.sha256(repr(told).encode())
    if tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        backend.no_padding()  # the last call's; every call sets its own
        backend.no_truncation()
        told_hash.update(backend.to_str().encode())
    else:
        told_hash.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    return told_hash.hexdigest()


# -- making examples -------------------------------------------------------------------------------
def _build(
    cfg: Dataset, task: Task, parts: Sequence[Part], renderer: Renderer | None
) -> tuple[Arrays, dict[str, Any]]:
    stats: dict[str, Any] = {"task": task, "train": None, "eval": None, "sources": [], "notes": []}
    sides = _sides(cfg, task, parts, stats)
    labels = _labels(sides.train, task, parts)
    arrays: Arrays = {}
    for side, records in zip(("train", "eval"), sides, strict=True):
        if records:
            made, stats[side] = Builder(cfg, task, renderer, labels, side).build(records)
            arrays |= {f"{side}.{name}": a for name, a in made.items()}
    return arrays, {"labels": labels, "stats": stats}


def _sides(cfg: Dataset, task: Task, parts: Sequence[Part], stats: dict[str, Any]) -> Sides:
    """Records to train on and to evaluate."""
    weights = [part.weight for part in parts]
    quotas = [None] * len(parts) if cfg.eval_samples is None else shares(weights, cfg.eval_samples)
    split = [_split(part, task, quota, stats) for part, quota in zip(parts, quotas, strict=True)]
    held_out = draw(
        [s.held_out for s in split], weights, cfg.eval_samples, cfg.seed, "eval_samples"
    )
    sources = [without(s.train, held_out) for s in split]
    train = draw(sources, weights, cfg.train_samples, cfg.seed, "train_samples")
    if not train:
        raise DataError(
            f"No training examples: of {sum(map(len, sources))} outside the held-out part none "
            "could be drawn. Lower dataset.eval_samples or dataset.eval_fraction, or give more "
            "rows."
        )
    if not held_out and cfg.eval_fraction and cfg.eval_samples is None:
        stats["notes"].append(
            f"No row fell into dataset.eval_fraction={cfg.eval_fraction}: there is no evaluation."
        )
    evaluated = half(held_out, cfg.eval_part)
    if held_out and not evaluated:
        raise DataError(
            f"dataset.eval_part={cfg.eval_part}: none of the {len(held_out)} held-out examples is "
            "in this half. Hold out more of them by dataset.eval_samples."
        )
    return Sides(train, evaluated)


def _split(part: Part, task: Task, quota: int | None, stats: dict[str, Any]) -> Sides:
    """One source's records, split, with its counts noted."""
    cfg = part.cfg
    rows, skipped, format_ = read_records(part, part.place, task)
    if part.held_out is None:
        sides = hold_out(rows, cfg.eval_fraction, quota, cfg.seed)
    else:
        other, more, _ = read_records(part, part.held_out, task)
        held_out = other if quota is None else smallest(other, quota, cfg.seed)
        sides, skipped = Sides(without(rows, held_out), held_out), skipped + more
    if quota is not None and len(sides.held_out) < quota:
        raise DataError(
            f"dataset.eval_samples: {quota} asked for from {cfg.path}, which has "
            f"{len(sides.held_out)}."
        )
    stats["sources"].append(
        {
            "path": cfg.path,
            "format": format_,
            "rows": len(rows),
            "unclear": skipped,
            "for_training": len(sides.train),
            "held_out": len(sides.held_out),
        }
    )
    return sides


def _labels(train: Sequence[Record], task: Task, parts: Sequence[Part]) -> tuple[str, ...] | None:
    """Classes or answer choices."""
    choices = next((p.cfg.choices for p in parts if p.cfg.choices), ())
    if task not in LABELLED:
        return choices or None
    labels = [r.content.label for r in train if isinstance(r.content, Labelled | Picture)]
    known = [label for label in labels if not isinstance(label, float)]
    return class_names(known, [r.where for r in train], choices)
