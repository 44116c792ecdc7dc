"""Where a run starts: anew, or where an earlier start in the same folder was stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from peftcli import config, written
from peftcli.dist.ranks import Ranks
from peftcli.errors import ConfigError, DataError, did_you_mean
from peftcli.screen import say
from peftcli.settings import Run
from peftcli.train import checkpoint
from peftcli.train.folder import RunFolder
from peftcli.train.rotation import by_step, step_of

# What may differ when a run goes on: none of it changes what is computed.
FREE = (
    "name", "run_dir", "resume", "logger.", "trainer.eval_steps", "trainer.save_steps",
    "trainer.save_total_limit", "trainer.keep_bytes", "trainer.rehearse", "trainer.longest_first",
    "trainer.logging_steps", "trainer.num_threads",
    "trainer.per_device_eval_batch_size", "trainer.generate_samples", "trainer.metric_for_best",
    "trainer.nonfinite_patience", "trainer.stop_after", "dataset.num_proc", "strategy.", "launch.",
)  # fmt: skip
# What may differ as long as a step has the same examples in the same order.
PORTIONS = ("trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps")


@dataclass(frozen=True)
class Start:
    """A verified checkpoint to go on from, or None; `finished`: there is nothing left to do."""

    checkpoint: Path | None = None
    finished: bool = False

    def shared(self, ranks: Ranks) -> Start:
        """What rank 0 has found. Raises `DataError` where its checkpoint is not seen here."""
        path, finished = ranks.exchange([str(self.checkpoint or ""), self.finished])[0]
        if path and not Path(path).is_dir():
            raise DataError(
                f"rank {ranks.rank} does not see the checkpoint {path}: run_dir must lie where all "
                "nodes can read it."
            )
        return Start(Path(path) if path else None, finished)


def where(run: Run, cfg: DictConfig, folder: RunFolder) -> Start:
    """What `resume` means here. With `never`, an earlier run goes into previous/N/; with a
    checkpoint, what came after it.
    """
    start = Start()
    if run.resume == "never":
        if (moved := folder.set_aside()) is not None:
            say(f"resume=never: what was in {folder.path} is now in {moved}", "yellow")
    elif run.resume != "auto":
        start = Start(_given(Path(run.resume)))
        if (moved := _make_room(Path(run.resume), folder)) is not None:
            say(f"resume={run.resume}: what came after it is now in {moved}", "yellow")
    else:
        earlier = folder.checkpoints / "config.yaml"
        if earlier.exists() and _has_begun(folder):
            before: Any = OmegaConf.to_container(OmegaConf.load(earlier), resolve=True)
            _refuse_changes(written.completed(before), config.resolved(cfg), folder)
        if folder.result.exists():
            return Start(finished=True)
        newest, skipped = checkpoint.newest(folder.checkpoints)
        for line in skipped:
            say(f"passed over {line}", "yellow")
        if newest is not None:
            return Start(newest)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder.checkpoints / "config.yaml", resolve=True)
    return start


def _has_begun(folder: RunFolder) -> bool:
    """Whether an earlier start came to training; one that was refused left nothing to keep."""
    return folder.metrics.exists() or folder.result.exists() or bool(by_step(folder.checkpoints))


def _make_room(given: Path, folder: RunFolder) -> Path | None:
    """Move aside what the run is not to find: later steps of this folder, or another run."""
    if given.resolve() in by_step(folder.checkpoints.resolve()):
        return folder.set_aside_after(step_of(given.resolve()))
    return folder.set_aside()


def _given(path: Path) -> Path:
    if not path.is_dir():
        near = (
            did_you_mean(path.name, (p.name for p in path.parent.glob("step-*")))
            if path.parent.is_dir()
            else ""
        )
        raise ConfigError(
            f"resume={path}: no such checkpoint folder (auto, never, or a step-NNNNNN "
            f"folder).{near}"
        )
    if (trouble := checkpoint.problem(path)) is not None:
        raise DataError(f"resume={path}: {trouble}.")
    return path


def _refuse_changes(before: dict[str, Any], now: dict[str, Any], folder: RunFolder) -> None:
    old, new = written.flat(before), written.flat(now)
    sizes = _portions(old), _portions(new)
    free = (*FREE, *PORTIONS) if sizes[0] == sizes[1] else FREE
    changed = {
        k: (old.get(k), new.get(k))
        for k in sorted(old.keys() | new.keys())
        if old.get(k) != new.get(k) and not k.startswith(free)
    }
    if sizes[0] != sizes[1] and not changed.keys() & set(PORTIONS):
        changed["examples of all ranks (a step, a round)"] = sizes
    if changed:
        said = [f"{k}: {there!r} there, {here!r} now" for k, (there, here) in changed.items()]
        listed = "; ".join(said[:6])
        raise ConfigError(
            f"run_dir={folder.path} holds a run with another configuration "
            f"({listed}{'; ...' if len(changed) > 6 else ''}). Choose another run_dir; or "
            "resume=never, which moves the old run aside; or "
            f"resume={folder.checkpoints}/step-NNNNNN, which goes on from there with the new "
            "values."
        )


def _portions(keys: dict[str, Any]) -> tuple[int, int]:
    """(examples of a step, examples of a round where they go by length): what fixes the order of
    the examples, by however many ranks.
    """
    ranks = 1
    if keys.get("strategy.name") not in (None, "single"):
        ranks = keys["launch.num_processes"] * keys["launch.nnodes"]
    each, times = (int(keys[key]) for key in PORTIONS)
    return each * times * ranks, each * ranks * bool(keys["dataset.group_by_length"])
