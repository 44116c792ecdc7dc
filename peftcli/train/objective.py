"""From a batch to its part of the step's loss: sums over what it holds, divided by how much of it
the whole step holds, so that batch 8 x 1 equals 1 x 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.data.collate import Batch, Example, num_targets
from peftcli.kernels.linear_cross_entropy import cross_entropy, linear_cross_entropy
from peftcli.models.head import answering
from peftcli.settings import Loss, Task

LEAST = 0.01  # added to 1 - p in the unlikelihood of T-Few, as in the authors' code


@dataclass(frozen=True)
class Totals:
    """Of all examples of a step: what the loss is a mean over."""

    targets: int
    wrong: int = 0  # tokens of wrong answer choices
    questions: int = 0  # examples with answer choices

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> Totals:
        """Sums over the batches."""
        return cls(
            targets=sum(b.num_targets for b in batches),
            wrong=sum(int(is_wrong(b).sum()) for b in batches if b.choices),
            questions=sum(len(b.choices) for b in batches),
        )

    @classmethod
    def ahead(cls, examples: Sequence[Example], kind: Loss) -> Totals:
        """The same for examples before any is batched, as other ranks will batch most of them."""
        asked = [e for e in examples if e.get("choices")] if kind == "tfew" else []
        return cls(
            targets=sum(num_targets(e, kind == "tfew") for e in examples),
            wrong=sum(sum(map(len, e["choices"])) - len(e["choices"][e["answer"]]) for e in asked),
            questions=len(asked),
        )


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
    return cross_entropy(logits, batch.targets)


def _loss_in_head(model: nn.Module, batch: Batch, head: nn.Linear) -> Tensor:
    def answer(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = hidden.squeeze(0) if batch.select is None else hidden[batch.select]
        return linear_cross_entropy(rows, weight, bias, batch.targets)

    with answering(head, answer):
        return model(**batch.inputs).logits


def loss(
    task: Task, kind: Loss, model: nn.Module, batch: Batch, totals: Totals, head: nn.Linear | None
) -> Tensor:
    """The batch's part of the step's loss, for the backward pass."""
    if kind == "tfew":
        return tfew(predict(model, batch), batch, totals)
    return loss_sum(task, model, batch, head) / totals.targets


def tfew(logits: Tensor, batch: Batch, totals: Totals) -> Tensor:
    """The three losses of T-Few on logits (N, V), each a mean of its own (Liu et al. 2022, arXiv
    2205.05638, section 3.2):

        cross entropy of the right answer
        unlikelihood of the wrong choices, -log(1 - p + 0.01) a token
        cross entropy over the choices, each scored by the mean log p of its tokens
    """
    assert batch.owner is not None, "answer choices need owners"
    log_p = -F.cross_entropy(logits.float(), batch.targets, reduction="none")  # (N,)
    counted = slice(None) if batch.counted is None else batch.counted
    total = -log_p[counted].sum() / totals.targets
    if not batch.choices:
        return total
    unlikely = torch.log(LEAST - torch.expm1(log_p[is_wrong(batch)]))
    lengths = batch.owner.bincount()
    scores = log_p.new_zeros(len(lengths)).index_add(0, batch.owner, log_p) / lengths
    for choice in batch.choices:
        right = torch.tensor(choice.answer, device=scores.device)
        among = F.cross_entropy(scores[list(choice.branches)], right)
        total = total + among / totals.questions
    return total - unlikely.sum() / max(totals.wrong, 1)


def is_wrong(batch: Batch) -> Tensor:
    """(N,), which targets of a batch with answer choices are tokens of a wrong one."""
    assert batch.owner is not None, "answer choices need owners"
    wrong = [b for c in batch.choices for i, b in enumerate(c.branches) if i != c.answer]
    return torch.isin(batch.owner, torch.tensor(wrong, dtype=torch.int64).to(batch.owner.device))


def describe(task: Task, kind: Loss) -> dict[str, Any]:
    """What the numbers mean, for the record."""
    if kind == "tfew":
        mean = (
            "mean cross entropy, nats per target, + unlikelihood of wrong choices + cross entropy"
        )
        return {"loss": f"{mean} over choices"}
    return {
        "loss": "mean squared error"
        if task == "regression"
        else "mean cross entropy, nats per target"
    }
