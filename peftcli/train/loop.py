"""The loop: the life cycle of `peftcli.core.method`, and the promises about numbers and
interruptions.

The loss of a step is a mean over all its micro-batches (`objective`). Between two steps a signal
may end the run, with a checkpoint that continues bit for bit. Numbers that are not finite never
reach the weights.

Among several ranks each takes its part of every round of micro-batches and all take the same step:
they tell each other all of it in one message, with their gradients. Rank 0 alone writes. What
follows is the same for one process, which is all ranks at once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from peftcli.core.host import Host
from peftcli.core.method import Method, Step
from peftcli.data.collate import Batch, Collator, Example
from peftcli.dist.ranks import Ranks
from peftcli.dist.strategies import Single
from peftcli.errors import ConfigError, Stopped
from peftcli.settings import Task, Trainer
from peftcli.train import better, checkpoint, device, finite, objective, optim, rehearsal, streams
from peftcli.train.evaluate import Indexed
from peftcli.train.folder import Log, RunFolder
from peftcli.train.plan import Plan, Progress
from peftcli.train.rotation import Keep
from peftcli.train.signals import Stopper, StopRequested


class Screen(Protocol):
    """What the loop tells whoever shows it."""

    def step(self, done: int, total: int, record: dict[str, Any]) -> None:
        """A step is done."""
        ...

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """An evaluation is done."""
        ...

    def note(self, text: str) -> None:
        """Something worth a line."""
        ...


@dataclass(frozen=True)
class Share:
    """A rank's part of a round of micro-batches. Where the round has fewer examples than there are
    ranks, some compute an example of another rank, so that all go through the model alike; it
    counts for nothing there.
    """

    batch: Batch
    counts: bool


@dataclass
class Loop:
    """One training: everything it needs, made by `run.py`."""

    host: Host
    method: Method
    task: Task
    settings: Trainer
    plan: Plan
    examples: Indexed
    lengths: np.ndarray
    collate: Collator
    optimizer: Optimizer
    scheduler: LRScheduler
    folder: RunFolder
    open_log: Callable[[Progress], Log]
    screen: Screen
    stopper: Stopper
    autocast: torch.dtype | None
    seed: int
    evaluate: Callable[[], dict[str, float]] | None
    publish: Callable[[Path, dict[str, float]], Any]
    group_by_length: bool = False
    head: nn.Linear | None = None  # takes the loss itself: see `objective.loss_sum`
    strategy: Single = field(default_factory=Single)
    progress: Progress = field(default_factory=Progress)
    asked: float = 0.0  # ranks that had been asked to stop when the last step summed its gradients

    def fit(self) -> Progress:
        """Train to the last step, evaluating and saving on the way. Raises `Stopped` after a
        signal, saved.
        """
        order, epoch = torch.empty(0), -1
        self.log = self.open_log(self.progress)
        self.host.model.train()
        try:
            if not self.progress.step and self.settings.longest_first:
                rehearsal.compute_longest(self)
            while True:
                self._evaluate_if_due()
                self._save_if_due()
                if self.progress.step >= self.plan.total:
                    return self.progress
                if self.asked or self.ranks.size == 1:
                    self.stopper.poll()
                if epoch != self.progress.step // self.plan.steps_per_epoch:
                    epoch = self.progress.step // self.plan.steps_per_epoch
                    order = self.order(epoch)
                self.step([self.examples[i] for i in self.plan.rows(order, self.progress.step)])
                if self.progress.step == 1 < self.plan.total and self.settings.rehearse:
                    rehearsal.save_and_publish(self)
        except StopRequested as request:
            path = self.save()
            raise Stopped(
                f"stopped by {request} after step {self.progress.step} of {self.plan.total}; saved "
                f"in {path}. `peft-train {self.folder.path}` goes on from there."
            ) from None
        finally:
            self.log.close()

    def restore(self, path: Any) -> None:
        """Continue from a verified checkpoint."""
        self.progress = Progress(**checkpoint.load(path, self._parts()))
        self.strategy.settle(self.host)

    def save(self, folder: Path | None = None) -> Path:
        """Write a checkpoint of now, on rank 0: into the run's checkpoints, or another folder."""
        snapshot = checkpoint.take(self._parts())
        if not self.ranks.is_main:
            return self._checkpoint
        best = [self.progress.best["step"]] if self.progress.best else []
        keep = Keep(self.settings.save_total_limit, self.settings.keep_bytes, frozenset(best))
        progress = asdict(self.progress)
        return checkpoint.save(
            folder or self.folder.checkpoints,
            self.progress.step,
            self._parts(),
            snapshot,
            progress,
            keep,
        )

    # -- one step ----------------------------------------------------------------------------------
    def step(self, examples: Sequence[Example]) -> float:
        """One optimizer step on these examples of all ranks; returns its loss."""
        start = time.perf_counter()
        t = Step(
            self.progress.step, self.plan.total, self.progress.step / self.plan.steps_per_epoch
        )
        if self.ranks.rank:  # rank 0 goes on in the stream that is in its checkpoints
            streams.seed_all(self.seed, f"dropout/{self.ranks.rank}/{t.index}")
        shares = self.shares(examples)
        totals = objective.Totals.ahead(examples, self.settings.loss)
        self.method.before_step(self.host, t)
        loss = self.forward_backward(shares, totals)
        penalty = self._penalise()
        broken = len(finite.not_finite(optim.state_tensors(self.optimizer)))
        tokens = sum(share.batch.num_tokens for share in shares if share.counts)
        is_asked = self.stopper.received is not None
        loss, broken, tokens, self.asked = self.strategy.reduce(
            self.host, loss, broken, tokens, is_asked
        )
        self.method.after_backward(self.host, t)
        norm = self.strategy.clip(self.host, self.settings.max_grad_norm)
        lr = float(self.scheduler.get_last_lr()[0])
        is_sound = math.isfinite(loss + (penalty or 0.0)) and math.isfinite(norm)
        if is_sound and not broken:
            self.optimizer.step()
            self.progress.nonfinite = 0
        else:
            finite.refuse_step(self, examples, loss, norm, int(broken))
        self.optimizer.zero_grad(set_to_none=True)
        self.strategy.settle(self.host)
        self.scheduler.step()
        self.method.after_step(self.host, t)
        self._reset_optimizer()
        self.progress.step += 1
        self.progress.tokens += int(tokens)
        seconds = time.perf_counter() - start
        self.progress.seconds += seconds
        self._record(totals.targets, int(tokens), loss, penalty, norm, lr, seconds)
        return loss

    def shares(self, examples: Sequence[Example]) -> list[Share]:
        """What this rank computes of a step's examples, round by round."""
        size = self.round_size
        rounds = [examples[i : i + size] for i in range(0, len(examples), size)]
        parts = [(self.ranks.part(r), r) for r in rounds]
        return [Share(self.collate(part or r[:1]), bool(part)) for part, r in parts]

    def forward_backward(self, shares: list[Share], totals: objective.Totals) -> float:
        """Accumulate the gradients of this rank's part of the step's loss; returns that part."""
        where = next(self.host.model.parameters()).device
        kind, total = self.settings.loss, 0.0
        for share in shares:
            with torch.autocast(where.type, self.autocast, enabled=self.autocast is not None):
                there = share.batch.to(where)
                loss = objective.loss(self.task, kind, self.host.model, there, totals, self.head)
            if not share.counts:
                loss = loss * 0.0
            loss.backward()
            total += loss.item()
        return total

    def _penalise(self) -> float | None:
        """Add the gradients of the method's penalty, if it has one; returns it."""
        if (penalty := self.method.penalty(self.host)) is None:
            return None
        (penalty / self.ranks.size).backward()  # the same on all ranks, whose gradients are summed
        return penalty.item()

    def _record(
        self,
        targets: int,
        tokens: int,
        loss: float,
        penalty: float | None,
        norm: float,
        lr: float,
        seconds: float,
    ) -> None:
        """One line of metrics: `loss` is the task's, without the method's `penalty`. What depends
        on the clock or the machine stands under `wall`.
        """
        step, where = self.progress.step, next(self.host.model.parameters()).device
        record = {
            "step": step,
            "epoch": round(step / self.plan.steps_per_epoch, 6),
            "loss": loss,
            **({} if penalty is None else {"penalty": penalty}),
            "grad_norm": norm,
            "lr": lr,
            "targets": targets,
            "tokens": tokens,
        }
        wall = {
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_memory": device.peak_memory(where),
        }
        if step % self.settings.logging_steps == 0 or step == self.plan.total:
            self.log.write({**record, "wall": wall})
        self.screen.step(step, self.plan.total, {**record, **wall})

    def _reset_optimizer(self) -> None:
        for parameter in self.host.reset_requests:
            self.optimizer.state.pop(parameter, None)
        self.host.reset_requests.clear()

    # -- evaluation and checkpoints ----------------------------------------------------------------
    def _evaluate_if_due(self) -> None:
        step, every = self.progress.step, self.settings.eval_steps
        at_edge = step == self.plan.total or (step == 0 and self.settings.eval_on_start)
        due = at_edge or (every is not None and step > 0 and step % every == 0)
        if self.evaluate is None or not due or self.progress.evaluated == step:
            return
        values = self.evaluate()
        self.progress.evaluated = step
        self.progress.last = values
        if step == 0:
            self.progress.first = values
        self.log.write({"step": step, **{f"eval_{k}": v for k, v in values.items()}})
        self.screen.evaluated(step, values)
        if step:
            self._keep_if_best(values)

    def _keep_if_best(self, values: dict[str, float]) -> None:
        name = better.choose_best(self.settings.metric_for_best, self.task, values)
        if name not in values:
            raise ConfigError(
                f"trainer.metric_for_best={name}: the evaluation gave no such metric, only "
                f"{sorted(values)}."
            )
        best = self.progress.best
        if not best or better.is_better(name, values[name], best["value"]):
            self.progress.best = {"step": self.progress.step, "metric": name, "value": values[name]}
            if self.settings.eval_steps is not None:
                self.publish(self.folder.best, values)

    def _save_if_due(self) -> None:
        step, every = self.progress.step, self.settings.save_steps
        if step == self.plan.total or (step and every is not None and step % every == 0):
            self.save()

    # -- small pieces ------------------------------------------------------------------------------
    def order(self, epoch: int) -> Tensor:
        """The examples of an epoch."""
        lengths = self.lengths if self.group_by_length else None
        return streams.order(len(self.examples), self.seed, epoch, lengths, self.round_size)

    @property
    def ranks(self) -> Ranks:
        """The processes of this run."""
        return self.strategy.ranks

    @property
    def round_size(self) -> int:
        """Examples that all ranks together compute at once."""
        return self.settings.per_device_train_batch_size * self.ranks.size

    @property
    def _checkpoint(self) -> Path:
        """Where the checkpoint of now is, or would be."""
        return self.folder.checkpoints / f"step-{self.progress.step:06d}"

    def _parts(self) -> checkpoint.Parts:
        return checkpoint.Parts(self.host, self.optimizer, self.scheduler)
