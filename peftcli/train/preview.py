"""A look at the task before training: the first micro-batches of the run's own training order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftcli.data.collate import Batch, Collator
from peftcli.settings import Task
from peftcli.train import objective, streams
from peftcli.train.evaluate import Indexed


@dataclass
class Preview:
    """What methods see of the task before they start (`core.scores.Calibration`)."""

    model: nn.Module
    task: Task
    examples: Indexed
    collate: Collator
    batch_size: int
    seed: int
    device: torch.device
    autocast: torch.dtype | None = None
    head: nn.Linear | None = None

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
        """The mean loss over the batch's targets."""
        with self._autocast():
            total = objective.loss_sum(self.task, self.model, batch, self.head)
        return total / batch.num_targets

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
