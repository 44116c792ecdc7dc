"""Which metrics there are, which of two values is better, and which metric tells. No torch."""

from __future__ import annotations

from collections.abc import Collection

from peftcli.settings import Task

BEST = {"causal_lm": "loss", "seq2seq": "loss", "regression": "pearson"}  # others: accuracy
HIGHER_IS_BETTER = {"accuracy", "f1", "mcc", "pearson", "spearman", "exact_match", "stopped"}
LOWER_IS_BETTER = {"loss", "perplexity", "mse"}


def choose_best(name: str, task: Task, metrics: Collection[str]) -> str:
    """The metric that tells the best step: the user's, or accuracy, pearson or loss by the task."""
    if name != "auto":
        return name
    default = "accuracy" if "accuracy" in metrics else BEST.get(task, "accuracy")
    return default if default in metrics else "loss"


def is_better(name: str, new: float, old: float) -> bool:
    """Whether `new` is better than `old` in the metric `name`."""
    return new < old if name in LOWER_IS_BETTER else new > old
