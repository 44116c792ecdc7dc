"""Records to examples: render, apply `on_overlong`, refuse examples without targets, count."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from peftcli.data.examples import Arrays, store, text_bytes
from peftcli.data.records import Labelled, Picture, Record
from peftcli.data.render import Encoded, Pair, Rendered, Renderer
from peftcli.errors import DataError
from peftcli.settings import Dataset, Task

CHUNK = 2000  # records rendered at once: bounds the memory of offsets


@dataclass
class Builder:
    """Collects the examples of one side."""

    cfg: Dataset
    task: Task
    renderer: Renderer | None  # None for images
    labels: tuple[str, ...] | None
    side: str
    kept: list[Any] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    overlong: list[tuple[int, str]] = field(default_factory=list)  # tokens and place
    counts: Counter[str] = field(default_factory=Counter)

    def build(self, records: Sequence[Record]) -> tuple[Arrays, dict[str, Any]]:
        """Arrays and statistics of the records' examples."""
        for chunk, rendered in self._rendered(records):
            for record, item in zip(chunk, rendered, strict=True):
                fitting = self._fitted(record, item)
                if fitting is not None:
                    self.kept.append(fitting)
                    self.records.append(record)
        if self.overlong and self.cfg.on_overlong == "error":
            raise DataError(self._too_long(len(records)))
        if not self.kept:
            raise DataError(
                f"No {self.side} examples are left: {self.counts['dropped_overlong']} of "
                f"{len(records)} are longer than dataset.max_length={self.cfg.max_length}, "
                f"{self.counts['dropped_without_targets']} have no targets."
            )
        arrays = self._arrays()
        return arrays, self._stats(arrays)

    # -- rendering ---------------------------------------------------------------------------------
    def _rendered(
        self, records: Sequence[Record]
    ) -> Iterator[tuple[Sequence[Record], Sequence[Any]]]:
        """Chunks with what they became; with `num_proc`, by so many fresh processes."""
        chunks = [records[i : i + CHUNK] for i in range(0, len(records), CHUNK)]
        render = self._render()
        if self.cfg.num_proc == 1 or len(chunks) == 1:
            yield from zip(chunks, map(render, chunks), strict=True)
            return
        spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
        with ProcessPoolExecutor(min(self.cfg.num_proc, len(chunks)), spawn) as pool:
            yield from zip(chunks, pool.map(render, chunks), strict=True)

    def _render(self) -> Callable[[Sequence[Record]], Sequence[Any]]:
        if self.renderer is None:
            return _images
        if self.task == "causal_lm":
            return self.renderer.decoder
        return self.renderer.seq2seq if self.task == "seq2seq" else self.renderer.classifier

    # -- length and targets ------------------------------------------------------------------------
    def _fitted(self, record: Record, item: Any) -> Any | None:
        """The example as it is trained on, or None where it is dropped."""
        tokens = _needed(item)
        if tokens > self.cfg.max_length:
            if self.cfg.on_overlong != "truncate":
                self.overlong.append((tokens, record.where))
                self.counts["dropped_overlong"] += 1
                return None
            self.counts["truncated"] += 1
            item = self._cut(record, item)
        if _is_trainable(item):
            return item
        if self.cfg.on_overlong == "drop":
            self.counts["dropped_without_targets"] += 1
            return None
        raise DataError(
            f"{record.where}: no token of this example is a target "
            f"(dataset.train_on={self.cfg.train_on}): it has no answer or no text. Correct the "
            "row, or drop such rows by dataset.on_overlong=drop."
        )

    def _cut(self, record: Record, item: Any) -> Any:
        """The beginning of an example; its answer, or what is left of it, must remain."""
        most = self.cfg.max_length
        if isinstance(item, Encoded):
            assert self.renderer is not None
            return self.renderer.classifier([record], most)[0]
        if isinstance(item, Pair):
            source = item.input_ids
            if len(source) > most:
                source = np.concatenate([source[: most - 1], source[-1:]])  # its end token stays
            item = item._replace(input_ids=source, labels=item.labels[:most])
            fits = not item.choices or max(map(len, item.choices)) <= most
        else:
            fits = not item.choices or item.prompt_length + max(map(len, item.choices)) <= most
            item = item._replace(input_ids=item.input_ids[:most], supervised=item.supervised[:most])
            fits = fits and item.supervised.any()
            if item.prompt_length is not None and item.prompt_length >= most:
                item = item._replace(prompt_length=None)
        if fits:
            return item
        raise DataError(
            f"{record.where}: the first dataset.max_length={most} tokens hold no answer, so "
            "truncation would leave nothing to learn. Raise dataset.max_length, or set "
            "dataset.on_overlong=drop."
        )

    def _too_long(self, total: int) -> str:
        longest, first = max(self.overlong), self.overlong[0]
        return (
            f"{len(self.overlong)} of {total} {self.side} examples are longer than "
            f"dataset.max_length={self.cfg.max_length}: the first at {first[1]} ({first[0]} "
            f"tokens), the longest at {longest[1]} ({longest[0]}). Set "
            f"dataset.max_length={longest[0]}, or dataset.on_overlong=drop or truncate."
        )

    # -- arrays ------------------------------------------------------------------------------------
    def _arrays(self) -> Arrays:
        arrays: Arrays = {}
        store(arrays, "id", [text_bytes(r.id) for r in self.records], np.uint8)
        if self.task == "image_classification":
            self._store_images(arrays)
        else:
            store(arrays, "input_ids", [item.input_ids for item in self.kept], np.int32)
        if self.task == "causal_lm":
            self._store_targets(arrays)
        elif self.task == "seq2seq":
            store(arrays, "labels", [item.labels for item in self.kept], np.int32)
            arrays["num_supervised"] = np.diff(arrays["labels_offsets"])
        else:
            self._store_labels(arrays)
        if self.task in ("causal_lm", "seq2seq"):
            self._store_choices(arrays)
        return arrays

    def _store_targets(self, arrays: Arrays) -> None:
        arrays["supervised"] = np.concatenate([item.supervised for item in self.kept])
        arrays["num_supervised"] = np.array(
            [np.count_nonzero(item.supervised) for item in self.kept], np.int64
        )
        lengths = [-1 if item.prompt_length is None else item.prompt_length for item in self.kept]
        arrays["prompt_length"] = np.array(lengths, np.int32)

    def _store_choices(self, arrays: Arrays) -> None:
        choices = [item.choices or [] for item in self.kept]
        store(arrays, "choices", [c for listed in choices for c in listed], np.int32)
        arrays["choices_rows"] = np.cumsum([0, *map(len, choices)]).astype(np.int64)
        arrays["answer"] = np.array(
            [-1 if item.answer is None else item.answer for item in self.kept], np.int32
        )

    def _store_labels(self, arrays: Arrays) -> None:
        arrays["num_supervised"] = np.ones(len(self.kept), np.int64)
        if self.task == "classification" and self.kept[0].token_type_ids is not None:
            arrays["token_type_ids"] = np.concatenate([item.token_type_ids for item in self.kept])
        if self.task == "regression":
            arrays["label"] = np.array([_label(r) for r in self.records], np.float64)
        else:
            arrays["label"] = np.array([self._class(r) for r in self.records], np.int64)

    def _class(self, record: Record) -> int:
        assert self.labels is not None
        name = str(_label(record))
        if name not in self.labels:
            raise DataError(
                f"{record.where}: the label {name!r} of this {self.side} example is none of the "
                f"classes ({', '.join(self.labels)}), which are those of the training examples or "
                "dataset.choices."
            )
        return self.labels.index(name)

    def _store_images(self, arrays: Arrays) -> None:
        images = [item.image for item in self.kept]
        arrays["is_path"] = np.array([isinstance(i, str) for i in images])
        flat = [text_bytes(i) if isinstance(i, str) else np.frombuffer(i, np.uint8) for i in images]
        store(arrays, "image", flat, np.uint8)

    def _stats(self, arrays: Arrays) -> dict[str, Any]:
        """What the screen shows about this side."""
        stats: dict[str, Any] = {"examples": len(self.kept)}
        if self.task != "image_classification":
            lengths = np.diff(arrays["input_ids_offsets"])
            if self.task == "seq2seq":
                lengths = lengths + np.diff(arrays["labels_offsets"])
            tokens = int(lengths.sum())
            stats |= {
                "tokens": tokens,
                "mean_length": tokens / len(lengths),
                "max_length": int(lengths.max()),
            }
        if self.task in ("causal_lm", "seq2seq"):
            supervised = int(arrays["num_supervised"].sum())
            stats |= {
                "supervised_tokens": supervised,
                "supervised_fraction": supervised / stats["tokens"],
            }
        for name in ("dropped_overlong", "dropped_without_targets", "truncated"):
            stats[name] = self.counts[name]
        index = arrays.get("answer", arrays.get("label"))
        if self.labels is not None and index is not None:
            stats["labels"] = {
                name: int(np.count_nonzero(index == i)) for i, name in enumerate(self.labels)
            }
        return stats


def _images(records: Sequence[Record]) -> list[Picture]:
    return [record.content for record in records if isinstance(record.content, Picture)]


def _label(record: Record) -> int | str | float:
    assert isinstance(record.content, Labelled | Picture)
    return record.content.label


def _is_trainable(item: Any) -> bool:
    """Whether there is something to read and something to learn."""
    if isinstance(item, Rendered):
        return bool(item.supervised.any())
    return isinstance(item, Picture) or len(item.input_ids) > 0


def _needed(item: Any) -> int:
    """Tokens that an example takes, with its longest choice."""
    if isinstance(item, Picture):
        return 1
    tokens = len(item.input_ids)
    if isinstance(item, Encoded):
        return tokens
    longest = max(map(len, item.choices), default=0) if item.choices else 0
    if isinstance(item, Pair):
        return max(tokens, len(item.labels), longest)
    return max(tokens, (item.prompt_length or 0) + longest)
