"""The schedules are transformers' own, and their options are checked before anything is loaded."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
import torch
from transformers import get_scheduler

from peftcli import config
from peftcli.errors import ConfigError
from peftcli.settings import Scheduler
from peftcli.train.optim import make_scheduler
from peftcli.train.schedules import SCHEDULES

WSD = "warmup_stable_decay"
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.3}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"power": 2.0, "lr_end": 1e-4}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 20}),
    ("cosine_with_min_lr", {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    (WSD, {"num_decay_steps": 7}),
    (WSD, {"num_decay_steps": 6, "min_lr_ratio": 0.1, "warmup_type": "cosine"}),
    (WSD, {"num_decay_steps": 9, "warmup_type": "1-sqrt", "decay_type": "1-sqrt"}),
    (WSD, {"num_decay_steps": 9, "decay_type": "linear"}),
]


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)


def rates(scheduler: Any, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=str)
def test_a_schedule_has_the_rates_of_transformers(name: Any, kwargs: Any, warmup: int) -> None:
    settings = Scheduler(name, warmup_steps=warmup, kwargs=kwargs)
    ours = rates(make_scheduler(settings, optimizer(), 30), 33)
    theirs = get_scheduler(name, optimizer(), warmup, 30, scheduler_specific_kwargs=kwargs)
    assert ours == pytest.approx(rates(theirs, 33), rel=1e-12, abs=1e-18)


def test_every_schedule_that_may_be_named_is_there_and_tested() -> None:
    named = set(get_args(get_type_hints(Scheduler)["name"]))
    assert named == set(SCHEDULES) == {name for name, _ in CASES}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scheduler.kwargs.cycles=2"], "scheduler.kwargs.num_cycles"),
        (["scheduler.kwargs.num_cycles=two"], "scheduler.kwargs.num_cycles=two: takes a number"),
        (["scheduler=wsd", "scheduler.kwargs.decay_type=cosin"], "cosine"),
        (["scheduler.name=warmup_stable_decay"], "scheduler.kwargs.num_decay_steps has no value"),
        (["scheduler.name=cosine_with_min_lr"], "takes one of scheduler.kwargs.min_lr"),
    ],
    ids=lambda value: str(value),
)
def test_options_that_a_schedule_does_not_take_are_refused(words: list[str], said: str) -> None:
    cfg = config.compose(["+recipe=lora_llama", "scheduler=cosine", *words])
    with pytest.raises(ConfigError) as caught:
        config.typed(cfg)
    assert said in str(caught.value)


def test_an_end_above_the_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"lr_end=0.1: must be less than optimizer.lr=0.001"):
        make_scheduler(Scheduler("polynomial", kwargs={"lr_end": 0.1}), optimizer(), 10)
