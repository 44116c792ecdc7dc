"""Metrics of an evaluation, gathered batch by batch so that no logits are kept; torchmetrics
computes them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peftcli.data.collate import Batch, Choice
from peftcli.settings import Task

ALONE: dict[str, Any] = {"sync_on_compute": False}  # every rank has all examples already

Part = dict[str, Any]  # what a batch adds to the metrics, in plain numbers


class Metrics:
    """Sums and streams for one task: `measure` a batch, anywhere; `add` all parts in their order;
    `compute` at the end.
    """

    def __init__(self, task: Task, num_classes: int | None = None) -> None:
        self.task = task
        self.loss_sum, self.num_targets, self.num_examples = 0.0, 0, 0
        self.streams = _streams(task, num_classes)
        self.answers: list[tuple[int, int]] = []  # (predicted, right) of each answer choice

    def measure(self, batch: Batch, logits: Tensor, losses: Tensor) -> Part:
        """What a batch adds: logits (N, V) or (B, ...) and the loss of each target (N,)."""
        counted = losses if batch.counted is None else losses[batch.counted]
        part = {
            "loss_sum": counted.double().sum().item(),
            "num_targets": counted.numel(),
            "num_examples": len(batch.ids),
            "answers": [_choose(choice, -losses, batch.owner) for choice in batch.choices],
        }
        if self.task in ("classification", "image_classification"):
            part |= {"said": logits.argmax(-1).tolist(), "right": batch.targets.tolist()}
        if self.task == "regression":
            said = logits.float().squeeze(-1)
            part |= {"said": said.tolist(), "right": batch.targets.tolist()}
        return part

    def add(self, part: Part) -> None:
        """Take in what `measure` gave for a batch."""
        self.loss_sum += part["loss_sum"]
        self.num_targets += part["num_targets"]
        self.num_examples += part["num_examples"]
        self.answers += map(tuple, part["answers"])
        for stream in self.streams.values():
            stream.update(torch.tensor(part["said"]), torch.tensor(part["right"]))

    def compute(self) -> dict[str, float]:
        """All metrics by name. An undefined one (a correlation of constants) is left out."""
        loss = self.loss_sum / max(self.num_targets, 1)
        values = {"loss": loss}
        if self.task in ("causal_lm", "seq2seq"):
            values["perplexity"] = math.exp(min(loss, 700.0))
        if self.answers:
            values |= _classification_metrics(self.answers)
        values |= {name: _number(stream) for name, stream in self.streams.items()}
        return {k: v for k, v in values.items() if math.isfinite(v) or k == "loss"}


def _choose(choice: Choice, log_p: Tensor, owner: Tensor | None) -> tuple[int, int]:
    """(chosen, right): the answer whose tokens have the largest log-probability in sum wins."""
    assert owner is not None, "answer choices need owners"
    scores = [log_p[owner == branch].sum().item() for branch in choice.branches]
    return max(range(len(scores)), key=scores.__getitem__), choice.answer


def _streams(task: Task, num_classes: int | None) -> dict[str, Any]:
    if task in ("classification", "image_classification"):
        return _classification(num_classes or 2)
    if task != "regression":
        return {}
    from torchmetrics import MeanSquaredError, PearsonCorrCoef, SpearmanCorrCoef

    classes = {"mse": MeanSquaredError, "pearson": PearsonCorrCoef, "spearman": SpearmanCorrCoef}
    return {name: cls(**ALONE) for name, cls in classes.items()}


def _classification(num_classes: int) -> dict[str, Any]:
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassF1Score,
        MulticlassMatthewsCorrCoef,
    )

    return {
        "accuracy": MulticlassAccuracy(num_classes, average="micro", **ALONE),
        "f1": MulticlassF1Score(num_classes, average="macro", **ALONE),
        "mcc": MulticlassMatthewsCorrCoef(num_classes, **ALONE),
    }


def _classification_metrics(answers: list[tuple[int, int]]) -> dict[str, float]:
    predicted, right = torch.tensor(answers).T
    streams = _classification(max(2, int(max(predicted.max(), right.max())) + 1))
    for stream in streams.values():
        stream.update(predicted, right)
    return {name: _number(stream) for name, stream in streams.items()}


def _number(stream: Any) -> float:
    """A float32 result with the digits that it has."""
    return float(f"{stream.compute().item():.7g}")
