"""`peft-train verify-resume`: whether this very configuration goes on bit for bit where it was
stopped.

Its first steps are trained twice: in one go, and with stops, after each of which everything is
built anew and restored from the checkpoint. Then everything is compared that the two have left:
the examples of every step in their order, losses, weights, optimizer, schedule, random streams.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from peftcli.budget import out_of_memory
from peftcli.build import adapt, build
from peftcli.data.collate import Batch, Example
from peftcli.errors import ConfigError, Stopped
from peftcli.run import make_loop
from peftcli.screen import LiveScreen, facts, say
from peftcli.settings import Run
from peftcli.train import checkpoint
from peftcli.train.folder import RunFolder
from peftcli.train.loop import Loop
from peftcli.train.signals import Stopper
from peftcli.written import flat


@dataclass(frozen=True)
class Report:
    """What was compared, and the first difference of each kind; `differences` is empty when all is
    exact.
    """

    steps: int
    stops: list[int]
    examples: int
    trained: int  # tensors
    optimizer: int  # tensors
    differences: dict[str, str]


class Watch(LiveScreen):
    """Remembers what every step computed."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[int, float] = {}
        self.examples: list[tuple[int, tuple[str, ...]]] = []  # of each micro-batch: step, ids

    def step(self, done: int, total: int, record: dict[str, Any]) -> None:
        """Keep the loss."""
        self.losses[done] = record["loss"]


@dataclass
class Course:
    """The first steps of a run in a folder of their own, with stops on the way."""

    run: Run
    cfg: DictConfig
    folder: RunFolder
    watch: Watch = field(default_factory=Watch)

    def go(self, stops: Sequence[int]) -> Path:
        """Train to the last of `stops`, building everything anew after each; the last
        checkpoint.
        """
        for stop in stops:
            self._train_to(stop)
            gc.collect()  # models point at themselves
        found, skipped = checkpoint.newest(self.folder.checkpoints)
        assert found is not None
        assert not skipped, skipped
        return found

    def _train_to(self, stop: int) -> None:
        with Stopper(quiet=True) as stopper:
            parts = build(self.run)
            adapt(parts)
            loop = make_loop(parts, self.cfg, self.folder, self.watch, stopper)
            parts.strategy.spread(parts.host, parts.device)
            loop.evaluate = None
            if stop > loop.plan.total:
                raise ConfigError(
                    f"--steps: the run has {loop.plan.total} steps, {stop} were asked."
                )
            found, _ = checkpoint.newest(self.folder.checkpoints)
            if found is not None:
                loop.restore(found)
            self._signal_in_step(loop, stop)
            try:
                loop.fit()
            except Stopped:
                assert loop.progress.step == stop

    def _signal_in_step(self, loop: Loop, stop: int) -> None:
        """Have SIGTERM come in the middle of the step that ends at `stop`."""
        plain = loop.collate

        def collate(examples: Sequence[Example]) -> Batch:
            ids = tuple(str(e["id"]) for e in examples)
            self.watch.examples.append((loop.progress.step + 1, ids))
            if loop.progress.step == stop - 1 and loop.stopper.received is None:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(examples)

        loop.collate = collate


def verify(
    run: Run, cfg: DictConfig, steps: int, stops: Sequence[int], *, as_json: bool = False
) -> int:
    """Train `steps` steps twice and compare; 0 where all is exact, else 1."""
    if run.strategy.name != "single":
        raise ConfigError(
            f"verify-resume trains in one process: strategy=single, not {run.strategy.name}."
        )
    if any(not 0 < stop < steps for stop in stops):
        raise ConfigError(
            f"--stops {','.join(map(str, stops))}: must lie within 1 and {steps - 1}."
        )
    trainer = replace(
        run.trainer, eval_on_start=False, rehearse=False, save_steps=None, logging_steps=1
    )
    run = replace(run, trainer=trainer, logger=replace(run.logger, name="jsonl"))
    with tempfile.TemporaryDirectory(prefix="peftcli-") as name, out_of_memory():
        straight, paused = (
            Course(run, cfg, RunFolder(Path(name) / kind)) for kind in ("straight", "paused")
        )
        for course in (straight, paused):
            course.folder.path.mkdir()
        say(f"{steps} steps in one go, then with a stop after step {_listed(stops)}", "cyan")
        report = compare(straight, straight.go([steps]), paused, paused.go([*stops, steps]), stops)
    if as_json:
        print(json.dumps(asdict(report), indent=2))
    else:
        show(report)
    return 1 if report.differences else 0


def compare(
    straight: Course, whole: Path, paused: Course, pieced: Path, stops: Sequence[int]
) -> Report:
    """What the two courses left in the checkpoints `whole` and `pieced`."""
    differences: dict[str, str] = {}
    seen, again = straight.watch, paused.watch
    if seen.examples != again.examples:
        step = next(
            (a[0] for a, b in zip(seen.examples, again.examples, strict=False) if a != b),
            max(seen.losses),
        )
        differences["examples"] = f"other ones from step {step} on"
    for step, loss in seen.losses.items():
        if loss != again.losses.get(step):
            differences["losses"] = f"step {step}: {loss!r}, and {again.losses.get(step)!r}"
            break
    counts = {}
    for part in ("trained", "optimizer", "random"):
        ours, theirs = (load_file(p / f"{part}.safetensors") for p in (whole, pieced))
        counts[part] = len(ours)
        if (said := next(_differing(ours, theirs), None)) is not None:
            differences[part] = said
    if said := _differing_state(whole, pieced):
        differences["state"] = said
    examples = sum(len(ids) for _, ids in seen.examples)
    steps = max(seen.losses)
    return Report(steps, list(stops), examples, counts["trained"], counts["optimizer"], differences)


def _differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> Iterator[str]:
    """A line for each tensor that is not the same, bit for bit."""
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in ours or name not in theirs:
            yield f"{name} is there in one of them only"
            continue
        a, b = ours[name], theirs[name]
        if not torch.equal(a, b):
            yield f"{name} by up to {(a.double() - b.double()).abs().max():.3g}"


def _differing_state(whole: Path, pieced: Path) -> str | None:
    """The first plain value that is not the same; the clock aside."""
    texts = [(p / "state.json").read_text(encoding="utf-8") for p in (whole, pieced)]
    ours, theirs = (flat(json.loads(text)) for text in texts)
    for key in sorted(ours.keys() | theirs.keys()):
        if key != "progress.seconds" and ours.get(key) != theirs.get(key):
            return f"{key}: {str(ours.get(key))[:60]}, and {str(theirs.get(key))[:60]}"
    return None


def show(report: Report) -> None:
    """The report on the screen."""
    held = {
        "examples": f"{report.examples:,} in the same order",
        "losses": f"of {report.steps} steps",
        "trained": f"{report.trained:,} tensors",
        "optimizer": f"{report.optimizer:,} tensors",
        "random": "all streams",
        "state": "schedule, progress, numpy's and Python's random states",
    }
    rows = {
        k: f"differ: {report.differences[k]}" if k in report.differences else f"same: {v}"
        for k, v in held.items()
    }
    facts("verify-resume", rows)
    if report.differences:
        say(f"not exact: {', '.join(report.differences)} differ", "red")
    else:
        say(f"exact: stopped after step {_listed(report.stops)}, and no bit differs", "green")


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))
