"""Metrics where the held-out examples are few."""

from __future__ import annotations

import torch

from peftcli.data.collate import Batch, Choice
from peftcli.train.metrics import Metrics


def test_one_held_out_example_whose_answer_is_the_first_has_an_accuracy() -> None:
    metrics = Metrics("causal_lm")
    owner = torch.tensor([0, 1])
    batch = Batch({}, torch.tensor([3, 4]), ("a",), 2, owner=owner, choices=(Choice((0, 1), 0),))
    metrics.add(metrics.measure(batch, torch.zeros(2, 5), torch.tensor([0.1, 2.0])))
    assert metrics.compute()["accuracy"] == 1.0
