"""From a batch to its loss: the sum over targets, and how many there are. The mean is the loop's,
over all that a step sees.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.data.collate import Batch
from peftcli.kernels.linear_cross_entropy import linear_cross_entropy
from peftcli.models.head import answering
from peftcli.settings import Task


def predict(model: nn.Module, batch: Batch) -> Tensor:
    """The logits that answer for the batch's targets: (N, V) for tokens, (B, classes), or (B,)
    ratings.
    """
    logits = model(**batch.inputs).logits
    if batch.select is not None:
        return logits[batch.select]
    return logits.squeeze(0) if batch.owner is not None else logits


def losses(task: Task, logits: Tensor, targets: Tensor) -> Tensor:
    """The loss of each target (N,), in float32: cross entropy, or the squared error of a rating."""
    if task == "regression":
        return (logits.float().squeeze(-1) - targets).square()
    return F.cross_entropy(logits.float(), targets, reduction="none")


def loss_sum(task: Task, model: nn.Module, batch: Batch, head: nn.Linear | None = None) -> Tensor:
    """The batch's summed loss, for the backward pass. `head`, a language model's whose output is
    its logits (`models.head`), takes the loss itself unless a method stands on it.
    """
    if type(head) is nn.Linear:
        return _loss_in_head(model, batch, head)
    logits = predict(model, batch)
    if task == "regression":
        return losses(task, logits, batch.targets).sum()
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


def _loss_in_head(model: nn.Module, batch: Batch, head: nn.Linear) -> Tensor:
    def answer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = hidden.squeeze(0) if batch.select is None else hidden[batch.select]
        return linear_cross_entropy(rows, weight, bias, batch.targets)

    with answering(head, answer):
        return model(**batch.inputs).logits


def describe(task: Task) -> dict[str, Any]:
    """What the numbers mean, for the record."""
    return {
        "loss": "mean squared error"
        if task == "regression"
        else "mean cross entropy, nats per target"
    }
