"""How long a training is, and how far it has come: arithmetic without a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from peftcli.settings import Trainer


@dataclass
class Plan:
    """How many examples, steps and epochs."""

    num_examples: int
    batch: int  # examples of an optimizer step
    steps_per_epoch: int
    total: int

    @classmethod
    def of(cls, settings: Trainer, num_examples: int, ranks: int = 1) -> Plan:
        """Steps are counted in optimizer steps of all `ranks` together; an epoch's last step takes
        what is left.
        """
        each = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        batch = each * ranks
        per_epoch = math.ceil(num_examples / batch)
        total = settings.max_steps or math.ceil(settings.num_train_epochs * per_epoch)
        return cls(num_examples, batch, per_epoch, total)

    def rows(self, order: Tensor, step: int) -> list[int]:
        """The examples of a step, from the order of its epoch."""
        start = step % self.steps_per_epoch * self.batch
        return order[start : start + self.batch].tolist()


@dataclass
class Progress:
    """Where the run is; all of it is in every checkpoint."""

    step: int = 0  # optimizer steps done
    evaluated: int = -1  # step of the last evaluation
    nonfinite: int = 0  # steps in a row that were skipped
    tokens: int = 0  # real tokens trained on
    seconds: float = 0.0  # spent in training steps
    first: dict[str, float] = field(default_factory=dict)  # metrics before training
    last: dict[str, float] = field(default_factory=dict)  # metrics of the newest evaluation
    best: dict[str, Any] = field(default_factory=dict)  # {"step": ..., "metric": ..., "value": ...}
