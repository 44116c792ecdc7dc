"""A look at the task before training: the first micro-batches of the run's own training order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.data.collate import Batch, Collator
from peftcli.settings import Loss, Task
from peftcli.train import objective, streams
from peftcli.train.evaluate import Indexed


@dataclass
class Preview:
    """What methods see of the task before they start (`core.scores.Calibration`). Of several ranks
    each sees all that one process would, rounds of `batch_size` examples, so that all choose alike.
    """

    model: nn.Module
    task: Task
    examples: Indexed
    collate: Collator
    batch_size: int
    seed: int
    device: torch.device
    autocast: torch.dtype | None = None
    head: nn.Linear | None = None
    tokenizer: Any = None
    labels: tuple[str, ...] = ()
    kind: Loss = "cross_entropy"

    def batches(self, n: int) -> Iterator[Batch]:
        """The first `n` micro-batches; fewer where the data end."""
        order = streams.order(len(self.examples), self.seed, 0).tolist()
        for start in range(0, min(n * self.batch_size, len(order)), self.batch_size):
            chosen = order[start : start + self.batch_size]
            yield self.collate([self.examples[i] for i in chosen]).to(self.device)

    def forward(self, batch: Batch) -> None:
        """Run the model over the batch, without gradients."""
        with torch.no_grad(), self._autocast():
            self.model(**batch.inputs)

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a step of this batch alone."""
        with self._autocast():
            totals = objective.Totals.of([batch])
            return objective.loss(self.task, self.kind, self.model, batch, totals, self.head)

    def tokens(self, batch: Batch, source: bool = False) -> Tensor | None:
        """(B, T), which tokens count: those that answer for a target, or all real ones where no
        token is a target or the `source` of an encoder-decoder is meant; None means all.
        """
        inputs, kept = batch.inputs, batch.inputs.get("logits_to_keep")
        if source or (batch.select is None and kept is None):
            mask = inputs.get("attention_mask")
            return None if mask is None else mask.bool()
        ids: Any = inputs.get("decoder_input_ids", inputs.get("input_ids"))
        found = torch.zeros_like(ids, dtype=torch.bool)
        if batch.select is None:
            found[0, kept] = True
        else:
            row, column = batch.select
            found[row, column if kept is None else kept[column]] = True
        return found

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
