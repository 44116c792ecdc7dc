"""Metrics of an evaluation, gathered batch by batch so that no logits are kept.

They are a few lines here, since torchmetrics imports matplotlib where that is installed: 3 s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peftcli.data.collate import Batch, Choice
from peftcli.settings import LABELLED, Task

Part = dict[str, Any]  # what a batch adds to the metrics, in plain numbers


class Metrics:
    """Sums and answers for one task: `measure` a batch, anywhere; `add` all parts in their order;
    `compute` at the end.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.loss_sum, self.num_targets, self.num_examples = 0.0, 0, 0
        self.said: list[Any] = []  # classes, chosen answers or ratings
        self.right: list[Any] = []

    def measure(self, batch: Batch, logits: Tensor, losses: Tensor) -> Part:
        """What a batch adds: logits (N, V) or (B, ...) and the loss of each target (N,)."""
        counted = losses if batch.counted is None else losses[batch.counted]
        part = {
            "loss_sum": counted.double().sum().item(),
            "num_targets": counted.numel(),
            "num_examples": len(batch.ids),
            "said": [],
            "right": [],
        }
        if batch.choices:
            answers = [_choose(choice, -losses, batch.owner) for choice in batch.choices]
            part |= {"said": answers, "right": [choice.answer for choice in batch.choices]}
        elif self.task in LABELLED:
            part |= {"said": logits.argmax(-1).tolist(), "right": batch.targets.tolist()}
        elif self.task == "regression":
            said = logits.float().squeeze(-1)
            part |= {"said": said.tolist(), "right": batch.targets.tolist()}
        return part

    def add(self, part: Part) -> None:
        """Take in what `measure` gave for a batch."""
        self.loss_sum += part["loss_sum"]
        self.num_targets += part["num_targets"]
        self.num_examples += part["num_examples"]
        self.said += part["said"]
        self.right += part["right"]

    def compute(self) -> dict[str, float]:
        """All metrics by name. An undefined one (a correlation of constants) is left out."""
        loss = self.loss_sum / max(self.num_targets, 1)
        values = {"loss": loss}
        if self.task in ("causal_lm", "seq2seq"):
            values["perplexity"] = math.exp(min(loss, 700.0))
        if self.said:
            found = of_ratings if self.task == "regression" else of_classes
            values |= found(self.said, self.right)
        return {k: v for k, v in values.items() if math.isfinite(v) or k == "loss"}


def _choose(choice: Choice, log_p: Tensor, owner: Tensor | None) -> int:
    """The answer whose tokens have the largest log-probability in sum."""
    assert owner is not None, "answer choices need owners"
    scores = [log_p[owner == branch].sum().item() for branch in choice.branches]
    return max(range(len(scores)), key=scores.__getitem__)


def of_classes(said: Sequence[int], right: Sequence[int]) -> dict[str, float]:
    """Accuracy; F1, the mean over the classes that occur; and Matthews' correlation of predictions
    and answers, 0 where either are all alike (Gorodkin 2004, R_K).
    """
    n = max(max(said), max(right)) + 1
    pairs = torch.tensor(right) * n + torch.tensor(said)
    counts = torch.bincount(pairs, minlength=n * n).view(n, n).double()  # (right, said)
    hits, is_right, is_said = counts.diagonal(), counts.sum(1), counts.sum(0)
    occurs = is_right + is_said > 0
    total, found = counts.sum(), hits.sum()
    spread = (total**2 - is_said.square().sum()) * (total**2 - is_right.square().sum())
    common = found * total - is_said @ is_right
    return {
        "accuracy": (found / total).item(),
        "f1": (2 * hits / (is_right + is_said))[occurs].mean().item(),
        "mcc": (common / spread.sqrt()).item() if spread else 0.0,
    }


def of_ratings(said: Sequence[float], right: Sequence[float]) -> dict[str, float]:
    """The mean squared error, and the correlations of Pearson and Spearman."""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (said, right))
    return {
        "mse": (x - y).square().mean().item(),
        "pearson": _correlation(x, y),
        "spearman": _correlation(_ranks(x), _ranks(y)),
    }


def _correlation(x: Tensor, y: Tensor) -> float:
    """Not a number where either is constant."""
    if (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def _ranks(x: Tensor) -> Tensor:
    """From 1; equal values share the mean of theirs."""
    _, which, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[which]
