"""Prepared examples: flat arrays, of which an example is a view."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from peftcli.settings import Task

Arrays = dict[str, np.ndarray]


class Ragged(NamedTuple):
    """Rows behind one another: row i is `flat[offsets[i] : offsets[i + 1]]`."""

    flat: np.ndarray
    offsets: np.ndarray  # (N + 1,) int64

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        """Row i, a view."""
        return self.flat[self.offsets[i] : self.offsets[i + 1]]


def ragged(rows: Sequence[np.ndarray], dtype: Any) -> Ragged:
    """The rows behind one another."""
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(r) for r in rows], out=offsets[1:])
    return Ragged(np.concatenate([np.zeros(0, dtype), *rows]).astype(dtype, copy=False), offsets)


def store(arrays: Arrays, name: str, rows: Sequence[np.ndarray], dtype: Any) -> None:
    """Keep ragged rows as two arrays."""
    arrays[name], arrays[f"{name}_offsets"] = ragged(rows, dtype)


def text_bytes(text: str) -> np.ndarray:
    """UTF-8 as numbers."""
    return np.frombuffer(text.encode(), np.uint8)


class Examples:
    """N examples of one task; see `__getitem__` for what one is.

    `lengths` (N,) are tokens (of source and target together in seq2seq, 1 for an image),
    `num_supervised` (N,) targets.
    """

    def __init__(self, task: Task, arrays: Mapping[str, np.ndarray]) -> None:
        """Over the arrays of one side of a cache's entry."""
        self.task = task
        self.arrays = arrays
        self.num_supervised = arrays["num_supervised"]
        self._id = self._ragged("id")
        self._inputs = self._ragged("image" if task == "image_classification" else "input_ids")
        self.lengths = np.diff(self._inputs.offsets)
        if task == "seq2seq":
            self._labels = self._ragged("labels")
            self.lengths = self.lengths + np.diff(self._labels.offsets)
        if task == "image_classification":
            self.lengths = np.ones(len(self), np.int64)
        if task in ("causal_lm", "seq2seq"):
            self._choices = self._ragged("choices")

    def _ragged(self, name: str) -> Ragged:
        return Ragged(self.arrays[name], self.arrays[f"{name}_offsets"])

    def __len__(self) -> int:
        """N."""
        return len(self.num_supervised)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All examples in order."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Example i: `id`, and by task

        causal_lm             input_ids int32 (T,); supervised bool (T,): the token is a target;
                              prompt_length: tokens before the last answer, None without one;
                              choices: list of int32 (C,), answer: the right one's index, or None
        seq2seq               input_ids, labels int32; choices, answer
        classification        input_ids, token_type_ids where the tokenizer has them, label int
        regression            the same, label float
        image_classification  image: path or bytes, label int
        """
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        example: dict[str, Any] = {"id": bytes(self._id[i]).decode()}
        if self.task == "image_classification":
            data = bytes(self._inputs[i])
            image = data.decode() if self.arrays["is_path"][i] else data
            return {**example, "image": image, "label": int(self.arrays["label"][i])}
        example["input_ids"] = self._inputs[i]
        if self.task in ("classification", "regression"):
            if "token_type_ids" in self.arrays:
                example["token_type_ids"] = Ragged(
                    self.arrays["token_type_ids"], self._inputs.offsets
                )[i]
            return {**example, "label": self.arrays["label"][i].item()}
        if self.task == "seq2seq":
            example["labels"] = self._labels[i]
        else:
            example["supervised"] = Ragged(self.arrays["supervised"], self._inputs.offsets)[i]
            example["prompt_length"] = _or_none(self.arrays["prompt_length"][i])
        first, last = self.arrays["choices_rows"][i : i + 2]
        example["choices"] = [self._choices[j] for j in range(first, last)] or None
        return {**example, "answer": _or_none(self.arrays["answer"][i])}


def _or_none(number: np.integer) -> int | None:
    return None if number < 0 else int(number)


class Piece(NamedTuple):
    """Decoded text, and whether its tokens are targets."""

    text: str
    supervised: bool


class Preview(NamedTuple):
    """One example as a person reads it."""

    id: str
    pieces: tuple[Piece, ...]
    label: str | None


@dataclass(frozen=True)
class Data:
    """Prepared examples; `labels` are classes or choices.

    `key` names the entry of the cache, and `hash` is that of its content.
    """

    train: Examples
    eval: Examples | None
    labels: tuple[str, ...] | None
    stats: dict[str, Any]
    key: str
    hash: str
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False, compare=False)

    def preview(self, k: int = 3, side: Literal["train", "eval"] = "train") -> list[Preview]:
        """The first k examples of a side, decoded, with their targets marked."""
        examples = self.train if side == "train" else self.eval
        return (
            [self._preview(examples[i]) for i in range(min(k, len(examples)))]
            if examples is not None
            else []
        )

    def _preview(self, example: dict[str, Any]) -> Preview:
        label = example.get("label")
        name = (
            self.labels[label]
            if isinstance(label, int) and self.labels
            else None
            if label is None
            else str(label)
        )
        if self.tokenizer is None:
            image = example["image"]
            return Preview(
                example["id"], (Piece(image if isinstance(image, str) else "<bytes>", False),), name
            )
        ids, marks = example["input_ids"], example.get("supervised")
        if marks is None:
            parts = [(ids, False), (example.get("labels", ids[:0]), True)]
        else:
            at = [0, *(np.flatnonzero(np.diff(marks)) + 1).tolist(), len(ids)]
            parts = [(ids[a:b], bool(marks[a])) for a, b in pairwise(at)]
        pieces = (
            Piece(str(self.tokenizer.decode(part.tolist())), mark)
            for part, mark in parts
            if len(part)
        )
        return Preview(example["id"], tuple(pieces), name)
