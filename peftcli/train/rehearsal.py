"""What would fail late fails at once: the longest micro-batch, a save, and what is published.

The longest micro-batch is computed ahead of the training and forgotten, instead of being moved to
its front: so neither the order of the examples nor a random stream depends on lengths, losses are
those of a run without it, and a run that goes on needs to know nothing of it.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np

from peftcli.core.method import Step
from peftcli.train import objective, streams

if TYPE_CHECKING:
    from peftcli.train.loop import Loop


def compute_longest(loop: Loop) -> None:
    """Forward and backward over the round with the most tokens, unless the first step has as many:
    memory that is too small for it fails here.
    """
    size, lengths = loop.round_size, loop.lengths
    longest = np.argsort(-lengths, kind="stable")[:size]
    first = loop.plan.rows(loop.order(0), 0)
    rounds = [lengths[first[i : i + size]].sum() for i in range(0, len(first), size)]
    if max(rounds) == lengths[longest].sum():
        return
    held = streams.state()
    examples = [loop.examples[i] for i in longest.tolist()]
    shares = loop.shares(examples)
    totals = objective.Totals.ahead(examples, loop.settings.loss)
    loop.method.before_step(loop.host, Step(0, loop.plan.total, 0.0))
    loop.forward_backward(shares, totals)
    loop.strategy.reduce(loop.host)
    loop.strategy.clip(loop.host, None)  # gradients are with the optimizer now, wherever they were
    loop.optimizer.zero_grad(set_to_none=True)
    loop.optimizer.state.clear()  # where methods note what they saw in the backward pass
    streams.restore(held)


def save_and_publish(loop: Loop) -> None:
    """A checkpoint, with the optimizer's state that the first step made, and what the end will
    publish; both are removed again.
    """
    folder = loop.folder.path / ".rehearsal"
    try:
        loop.save(folder)
        loop.publish(folder / "adapter", {})
    finally:
        if loop.ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
