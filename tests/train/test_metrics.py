"""Metrics are those that their names mean."""

from __future__ import annotations

import math

import pytest
import torch

from peftcli.data.collate import Batch, Choice
from peftcli.train.metrics import Metrics, of_classes, of_ratings


def test_one_held_out_example_whose_answer_is_the_first_has_an_accuracy() -> None:
    metrics = Metrics("causal_lm")
    owner = torch.tensor([0, 1])
    batch = Batch({}, torch.tensor([3, 4]), ("a",), 2, owner=owner, choices=(Choice((0, 1), 0),))
    metrics.add(metrics.measure(batch, torch.zeros(2, 5), torch.tensor([0.1, 2.0])))
    assert metrics.compute()["accuracy"] == 1.0


def test_metrics_of_classes_are_those_of_torchmetrics() -> None:
    theirs = pytest.importorskip("torchmetrics.functional.classification")
    draw = torch.Generator().manual_seed(0)
    said, right = torch.randint(4, (2, 60), generator=draw)  # of five classes one never occurs
    found = of_classes(said.tolist(), right.tolist())
    wanted = {
        "accuracy": theirs.multiclass_accuracy(said, right, 5, average="micro"),
        "f1": theirs.multiclass_f1_score(said, right, 5, average="macro"),
        "mcc": theirs.multiclass_matthews_corrcoef(said, right, 5),
    }
    assert found == pytest.approx({name: value.item() for name, value in wanted.items()}, rel=1e-5)


def test_a_classifier_that_says_one_class_has_no_correlation() -> None:
    assert of_classes([1, 1, 1], [0, 1, 1]) == pytest.approx(
        {"accuracy": 2 / 3, "f1": 0.4, "mcc": 0.0}
    )


def test_metrics_of_ratings_are_those_of_torchmetrics() -> None:
    theirs = pytest.importorskip("torchmetrics.functional.regression")
    draw = torch.Generator().manual_seed(0)
    right = torch.randn(50, generator=draw).mul(2).round()  # ties
    said = right + torch.randn(50, generator=draw)
    found = of_ratings(said.tolist(), right.tolist())
    wanted = {
        "mse": theirs.mean_squared_error(said, right),
        "pearson": theirs.pearson_corrcoef(said, right),
        "spearman": theirs.spearman_corrcoef(said, right),
    }
    assert found == pytest.approx({name: value.item() for name, value in wanted.items()}, rel=1e-5)
    constant = of_ratings([2.0] * 50, right.tolist())
    assert math.isnan(constant["pearson"])
    assert math.isnan(constant["spearman"])
