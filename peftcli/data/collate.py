"""Examples to batches. A batch says what the model is called with, and which logits answer for
which targets.

Decoders get no token that nothing is predicted from: a row ends before its last target. Where the
model allows packed rows, a batch is one row without padding, and a beginning that all its examples
share is laid and computed once; both give the loss and the gradients of the padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from peftcli.kernels.packed_attention import Segment, Segments
from peftcli.settings import Task

Example = Mapping[str, Any]
Collator = Callable[[Sequence[Example]], "Batch"]


class Choice(NamedTuple):
    """Answer choices of one example: the branches that end in them, and which is right."""

    branches: tuple[int, ...]
    answer: int


@dataclass(frozen=True)
class Batch:
    """`inputs` go to the model. The logits at `select` (rows, columns), or all in order, answer for
    `targets` (N,).

    `owner` (N,) names the branch of each target, and `choices` which branches compete, where
    answers are scored; `counted` (N,) tells the targets that count for the loss from those that are
    there only to score a choice.
    """

    inputs: dict[str, Any]
    targets: Tensor
    ids: tuple[str, ...]
    num_tokens: int
    select: tuple[Tensor, Tensor] | None = None
    owner: Tensor | None = None
    counted: Tensor | None = None
    choices: tuple[Choice, ...] = field(default_factory=tuple)

    @property
    def num_targets(self) -> int:
        """Targets of the loss."""
        return len(self.targets) if self.counted is None else int(self.counted.sum())

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on the device."""
        if device.type == "cpu":
            return self
        move = lambda t: t.to(device, non_blocking=True) if isinstance(t, Tensor) else t  # noqa: E731
        return replace(
            self,
            inputs={k: move(v) for k, v in self.inputs.items()},
            targets=move(self.targets),
            select=None if self.select is None else (move(self.select[0]), move(self.select[1])),
            owner=move(self.owner),
            counted=move(self.counted),
        )


class Branch(NamedTuple):
    """A prefix (P,), which neighbours may share, a continuation (T,), and which continuation tokens
    are targets (T,).
    """

    prefix: np.ndarray
    tail: np.ndarray
    targets: np.ndarray
    counted: bool = True

    def trimmed(self) -> Branch:
        """Without what follows the last target; the very first token of a row is no target, nothing
        predicts it.
        """
        targets = self.targets if len(self.prefix) else np.concatenate([[False], self.targets[1:]])
        stop = int(np.flatnonzero(targets)[-1]) + 1
        return self._replace(tail=self.tail[:stop], targets=targets[:stop])


# -- decoders --------------------------------------------------------------------------------------
def training_branches(examples: Sequence[Example], share: bool) -> list[Branch]:
    """One branch an example; with `share`, the beginning that all of them have in common is their
    prefix.
    """
    shared = _common_prefix(examples) if share and len(examples) > 1 else 0
    return [
        Branch(e["input_ids"][:shared], e["input_ids"][shared:], e["supervised"][shared:]).trimmed()
        for e in examples
    ]


def _common_prefix(examples: Sequence[Example]) -> int:
    """Tokens that all examples begin with, short of the first target."""
    limit = min(int(np.flatnonzero(e["supervised"])[0]) for e in examples)
    rows = np.stack([e["input_ids"][:limit] for e in examples])
    differs = np.flatnonzero((rows != rows[0]).any(0))
    return int(differs[0]) if len(differs) else limit


def scoring_branches(examples: Sequence[Example]) -> tuple[list[Branch], tuple[Choice, ...]]:
    """For each example its completion, which counts for the loss, and its answer choices, all on
    the same prompt.
    """
    branches: list[Branch] = []
    choices: list[Choice] = []
    for e in examples:
        if not e.get("choices"):
            branches += training_branches([e], share=False)
            continue
        P, ids = e["prompt_length"], e["input_ids"]
        branches.append(Branch(ids[:P], ids[P:], e["supervised"][P:]).trimmed())
        first = len(branches)
        branches += [
            Branch(ids[:P], tail, np.ones(len(tail), bool), False) for tail in e["choices"]
        ]
        choices.append(Choice(tuple(range(first, len(branches))), e["answer"]))
    return branches, tuple(choices)


def packed_row(
    branches: Sequence[Branch], ids: tuple[str, ...], choices: tuple[Choice, ...] = ()
) -> Batch:
    """All branches in one row (1, T): each prefix once, behind it what continues it."""
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[Segment] = []
    keep: list[np.ndarray] = []
    start, held = 0, Segment(0, 0)
    previous: np.ndarray | None = None

    def lay(part: np.ndarray, first_position: int, prefix: Segment) -> Segment:
        nonlocal start
        segment = Segment(start, start + len(part), prefix.start, prefix.stop)
        if len(part):
            tokens.append(part)
            positions.append(np.arange(first_position, first_position + len(part)))
            segments.append(segment)
            start += len(part)
        return segment

    for branch in branches:
        P = len(branch.prefix)
        if not P:
            held = Segment(0, 0)
        elif branch.prefix is not previous and (
            previous is None or not np.array_equal(branch.prefix, previous)
        ):
            held = lay(branch.prefix, 0, Segment(0, 0))
        previous = branch.prefix
        segment = lay(branch.tail[:-1], P, held)
        before = (
            np.arange(len(branch.tail)) + segment.start - 1
        )  # the token that predicts each of the tail
        if P:
            before[0] = held.stop - 1
        keep.append(before[branch.targets])
    counts = [int(b.targets.sum()) for b in branches]
    row = torch.from_numpy(np.concatenate(tokens).astype(np.int64))[None]
    inputs = {
        "input_ids": row,
        "position_ids": torch.from_numpy(np.concatenate(positions).astype(np.int64))[None],
        "segments": Segments(segments),
        "logits_to_keep": torch.from_numpy(np.concatenate(keep)),
        "use_cache": False,
    }
    return Batch(
        inputs,
        _targets(branches),
        ids,
        row.shape[1],
        None,
        _owner(counts),
        _counted(branches, counts),
        choices,
    )


def num_targets(example: Example, scoring: bool = False) -> int:
    """Targets of the loss in an example, in whichever batch it will be. With `scoring` and choices
    only its last answer counts, the one that is scored.
    """
    if "supervised" not in example:
        return len(example["labels"]) if "labels" in example else 1
    is_scored = scoring and example["choices"]
    return int(example["supervised"][example["prompt_length"] if is_scored else 1 :].sum())


def padded_rows(
    branches: Sequence[Branch],
    ids: tuple[str, ...],
    pad: int,
    choices: tuple[Choice, ...] = (),
    keeps: bool = True,
) -> Batch:
    """One row a branch, padded on the right; masked by position, never by the padding's id."""
    lengths = [len(b.prefix) + len(b.tail) - 1 for b in branches]
    T = max(lengths)
    rows = np.full((len(branches), T), pad, np.int64)
    mask = np.zeros((len(branches), T), np.int64)
    row_of: list[np.ndarray] = []
    column_of: list[np.ndarray] = []
    for i, (branch, n) in enumerate(zip(branches, lengths, strict=True)):
        rows[i, :n] = np.concatenate([branch.prefix, branch.tail[:-1]])
        mask[i, :n] = 1
        column = np.flatnonzero(branch.targets) + len(branch.prefix) - 1
        row_of.append(np.full(len(column), i))
        column_of.append(column)
    row, column = np.concatenate(row_of), np.concatenate(column_of)
    counts = [int(b.targets.sum()) for b in branches]
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(rows),
        "attention_mask": torch.from_numpy(mask),
        "use_cache": False,
    }
    if keeps:  # only columns where some row has a target reach the head
        kept = np.unique(column)
        inputs["logits_to_keep"] = torch.from_numpy(kept)
        column = np.searchsorted(kept, column)
    select = torch.from_numpy(row), torch.from_numpy(column)
    return Batch(
        inputs,
        _targets(branches),
        ids,
        sum(lengths),
        select,
        _owner(counts),
        _counted(branches, counts),
        choices,
    )


def _targets(branches: Sequence[Branch]) -> Tensor:
    return torch.from_numpy(np.concatenate([b.tail[b.targets] for b in branches]).astype(np.int64))


def _owner(counts: Sequence[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def _counted(branches: Sequence[Branch], counts: Sequence[int]) -> Tensor | None:
    if all(b.counted for b in branches):
        return None
    return torch.repeat_interleave(
        torch.tensor([b.counted for b in branches]), torch.tensor(counts)
    )


# -- the collators ---------------------------------------------------------------------------------
def causal_collator(pad: int, packing: bool, scoring: bool = False, keeps: bool = True) -> Collator:
    """For decoders. `scoring` adds answer choices; `keeps`: the model takes `logits_to_keep`."""

    def collate(examples: Sequence[Example]) -> Batch:
        ids = _ids(examples)
        if scoring:
            branches, choices = scoring_branches(examples)
        else:
            branches, choices = training_branches(examples, share=packing), ()
        if packing:
            return packed_row(branches, ids, choices)
        return padded_rows(branches, ids, pad, choices, keeps)

    return collate


def seq2seq_collator(pad: int, start: int, scoring: bool = False) -> Collator:
    """For encoder-decoders: the source in the encoder, the target shifted right behind `start` in
    the decoder.
    """

    def collate(examples: Sequence[Example]) -> Batch:
        rows: list[tuple[np.ndarray, np.ndarray, bool]] = []  # source, target, counts for the loss
        choices: list[Choice] = []
        for e in examples:
            rows.append((e["input_ids"], e["labels"], True))
            if scoring and e.get("choices"):
                first = len(rows)
                rows += [(e["input_ids"], tail, False) for tail in e["choices"]]
                choices.append(Choice(tuple(range(first, len(rows))), e["answer"]))
        sources, tails, counted = (list(column) for column in zip(*rows, strict=True))
        source, mask = _pad(sources, pad)
        decoder, decoder_mask = _pad([np.concatenate([[start], t[:-1]]) for t in tails], pad)
        row, column = torch.nonzero(decoder_mask, as_tuple=True)
        counts = [len(t) for t in tails]
        inputs = {
            "input_ids": source,
            "attention_mask": mask,
            "decoder_input_ids": decoder,
            "use_cache": False,
        }
        targets = torch.from_numpy(np.concatenate(tails).astype(np.int64))
        flags = (
            None
            if all(counted)
            else torch.repeat_interleave(torch.tensor(counted), torch.tensor(counts))
        )
        num_tokens = int(mask.sum() + decoder_mask.sum())
        return Batch(
            inputs,
            targets,
            _ids(examples),
            num_tokens,
            (row, column),
            _owner(counts),
            flags,
            tuple(choices),
        )

    return collate


def classification_collator(pad: int, dtype: torch.dtype = torch.int64) -> Collator:
    """For one label an example: class indices (int64) or ratings (float32)."""

    def collate(examples: Sequence[Example]) -> Batch:
        rows, mask = _pad([e["input_ids"] for e in examples], pad)
        inputs = {"input_ids": rows, "attention_mask": mask}
        if "token_type_ids" in examples[0]:
            inputs["token_type_ids"] = _pad([e["token_type_ids"] for e in examples], 0)[0]
        labels = torch.tensor([e["label"] for e in examples], dtype=dtype)
        return Batch(inputs, labels, _ids(examples), int(mask.sum()))

    return collate


def image_collator(pixels: Callable[[Sequence[Any]], Tensor]) -> Collator:
    """For images; `pixels` turns paths or bytes into (B, C, H, W)."""

    def collate(examples: Sequence[Example]) -> Batch:
        labels = torch.tensor([e["label"] for e in examples], dtype=torch.int64)
        inputs = {"pixel_values": pixels([e["image"] for e in examples])}
        return Batch(inputs, labels, _ids(examples), len(examples))

    return collate


def make_collator(
    task: Task,
    *,
    pad: int = 0,
    packing: bool = False,
    scoring: bool = False,
    keeps: bool = True,
    start: int = 0,
    pixels: Callable[[Sequence[Any]], Tensor] | None = None,
) -> Collator:
    """The collator of a task."""
    if task == "causal_lm":
        return causal_collator(pad, packing, scoring, keeps)
    if task == "seq2seq":
        return seq2seq_collator(pad, start, scoring)
    if task == "image_classification":
        assert pixels is not None, "image collation needs the processor"
        return image_collator(pixels)
    return classification_collator(pad, torch.float32 if task == "regression" else torch.int64)


def _pad(rows: Sequence[np.ndarray], pad: int) -> tuple[Tensor, Tensor]:
    """(B, T) ids padded on the right, and the mask (B, T) of what is real."""
    T = max(len(r) for r in rows)
    ids = np.full((len(rows), T), pad, np.int64)
    mask = np.zeros((len(rows), T), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def _ids(examples: Sequence[Example]) -> tuple[str, ...]:
    return tuple(str(e["id"]) for e in examples)
