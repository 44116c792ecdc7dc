"""What would fail late fails first: a save, what is published, and the longest micro-batch, all
before the first step.

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


def rehearse(loop: Loop) -> None:
    """What `trainer.rehearse` and `trainer.longest_first` ask for; evaluation is then due by
    itself.
    """
    if loop.settings.longest_first:
        compute_longest(loop)
    if loop.settings.rehearse:
        loop.save()
        folder = loop.folder.path / ".rehearsal"
        try:
            loop.publish(folder, {})
        finally:
            if loop.ranks.is_main:
                shutil.rmtree(folder, ignore_errors=True)


def compute_longest(loop: Loop) -> None:
    """Forward and backward over the round with the most tokens: memory that is too small for it
    fails here.
    """
    held = streams.state()
    longest = np.argsort(-loop.lengths, kind="stable")[: loop.round_size].tolist()
    shares = loop.shares([loop.examples[i] for i in longest])
    batches = [share.batch for share in shares if share.counts]
    loop.method.before_step(loop.host, Step(0, loop.plan.total, 0.0))
    loop.forward_backward(shares, objective.Totals.of(batches).over(loop.ranks))
    loop.optimizer.zero_grad(set_to_none=True)
    loop.optimizer.state.clear()  # where methods note what they saw in the backward pass
    streams.restore(held)
