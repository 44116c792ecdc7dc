"""The verbs that load a model: train, check, evaluate, generate, export. The one file that knows
every part.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from peftcli import config, describe, record, resume, stored
from peftcli.budget import out_of_memory
from peftcli.build import Parts, adapt, build, empty_host, evaluator, training_collator
from peftcli.chat import answer_all, chat
from peftcli.core.host import Host
from peftcli.dist import environment, joining, launch, strategies
from peftcli.errors import ConfigError
from peftcli.export import adapter, compare, publish
from peftcli.methods import hft
from peftcli.models import attention
from peftcli.models.quantise import requantised
from peftcli.models.source import cache_dir, is_here
from peftcli.screen import LiveScreen, hidden_screen, log_to, say
from peftcli.settings import Quantization, Run
from peftcli.train import device, loggers, optim, streams
from peftcli.train.folder import Log, MetricsLog, NoLog, RunFolder
from peftcli.train.loop import Loop
from peftcli.train.plan import Plan, Progress
from peftcli.train.signals import Stopper


def train(run: Run, cfg: DictConfig) -> int:
    """Fine-tune, evaluate before and after, and leave the run folder; goes on where an earlier
    start was stopped. With a strategy of several ranks this starts them, or is one of them.
    """
    if launch.starts_ranks(run):
        launch.start(run, cfg)
        return 0
    started, is_main = datetime.now(UTC), environment.rank_in_environment() == 0
    cfg, folder = environment.with_numbers(cfg), RunFolder(Path(run.run_dir))
    screen = LiveScreen() if is_main else hidden_screen()
    stopper = Stopper(not is_main, training=False, stop_after=run.trainer.stop_after)
    with stopper, out_of_memory() as running, ExitStack() as held:
        start = resume.Start()
        if is_main:
            held.enter_context(folder.locked())
            start = begin(run, cfg, folder)
        parts = None if start.finished else build(run, sharding=strategies.shards(run))
        strategy = held.enter_context(joining.joined(run, cfg, device.current()))
        start = start.shared(strategy.ranks)
        if start.finished or parts is None:
            return 0
        parts.strategy = strategy
        adapt(parts)
        stopper.begin(strategy.ranks)
        loop = make_loop(parts, cfg, folder, screen, stopper)
        running.parts, running.plan = parts, loop.plan
        describe.plan(parts, loop.plan, loop.optimizer)
        first_hash = parts.host.digest()
        strategy.spread(parts.host, parts.device)
        if start.checkpoint is not None:
            loop.restore(start.checkpoint)
            say(f"resuming after step {loop.progress.step} from {start.checkpoint}", "cyan")
        with screen.training(loop.plan.total, loop.progress.step):
            progress = loop.fit()
        run.method.finish(parts.host)
        with strategy.whole(parts.host, run.method.publishes_model) as keeps_it:
            if keeps_it:
                numbers = (progress, started, screen.first_step, first_hash)
                leave(parts, cfg, folder, *numbers)
    return 0


def leave(
    parts: Parts,
    cfg: DictConfig,
    folder: RunFolder,
    progress: Progress,
    started: datetime,
    first_step: float | None,
    first_hash: str,
) -> None:
    """What a finished run leaves: the adapter, its record, and words on the screen."""
    file_size = publish.publish(parts, folder.adapter, progress.last)
    result = record.make_result(parts, cfg, progress, started, first_step, file_size, first_hash)
    folder.write_result(result)
    describe.results(parts, progress, folder, file_size)


def begin(run: Run, cfg: DictConfig, folder: RunFolder) -> resume.Start:
    """Where the run starts; its configuration and its log in the folder."""
    start = resume.where(run, cfg, folder)
    cfg = cfg.copy()
    cfg.resume = "auto"  # whoever starts the folder goes on, and does not begin again
    config.save(cfg, folder.path)
    log_to(folder.log)
    if start.finished:
        say(
            f"{folder.path} holds this run, finished. To train again: another run_dir, or "
            "resume=never."
        )
    return start


def make_loop(
    parts: Parts, cfg: DictConfig, folder: RunFolder, screen: LiveScreen, stopper: Stopper
) -> Loop:
    """The training of these parts, at its first step."""
    run, data = parts.run, parts.data
    assert data is not None
    ranks = parts.strategy.ranks
    plan = Plan.of(run.trainer, len(data.train), ranks.size)
    optimizer = optim.make_optimizer(run.optimizer, run.method, parts.host)
    strategies.refuse_optimizer(run, parts.host)
    streams.seed_all(run.seed, "dropout")

    def open_log(at: Progress) -> Log:
        if not ranks.is_main:
            return NoLog()
        sink = loggers.make_sink(run, folder.path, cfg, at.step)
        return MetricsLog(folder.metrics, at.step, at.evaluated, sink)

    def publish_whole(place: Path, values: dict[str, float]) -> None:
        with parts.strategy.whole(parts.host, run.method.publishes_model) as keeps_it:
            if keeps_it:
                publish.publish(parts, place, values)

    return Loop(
        host=parts.host,
        method=run.method,
        task=parts.task,
        settings=run.trainer,
        plan=plan,
        examples=data.train,
        lengths=data.train.lengths,
        collate=training_collator(parts),
        head=parts.head,
        optimizer=optimizer,
        scheduler=optim.make_scheduler(run.scheduler, optimizer, plan.total),
        folder=folder,
        open_log=open_log,
        screen=screen,
        stopper=stopper,
        autocast=parts.autocast,
        seed=run.seed,
        evaluate=evaluator(parts, screen.counting, stopper.poll),
        publish=publish_whole,
        group_by_length=run.dataset.group_by_length and not parts.packing,
        strategy=parts.strategy,
    )


def check(run: Run, cfg: DictConfig, *, as_json: bool = False) -> int:
    """Everything but training: what would train on which sites, data and masks, steps, memory, disk
    and time; of a model that is known by its dimensions alone, what would train.
    """
    if run.model.architecture and not is_here(run.model, cache_dir()):
        return count(run, as_json=as_json)
    with out_of_memory():
        parts = build(run)
        adapt(parts)
        assert parts.data is not None
        plan = Plan.of(run.trainer, len(parts.data.train), launch.num_ranks(run))
        optimizer = optim.make_optimizer(run.optimizer, run.method, parts.host)
        strategies.refuse_optimizer(run, parts.host)
        optim.make_scheduler(run.scheduler, optimizer, plan.total)
        found = describe.plan(parts, plan, optimizer, measured=True, quiet=as_json)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        describe.preview(parts.data)
        say("nothing was trained; start it with the same words after `peft-train train`", "green")
    return 0


def count(run: Run, *, as_json: bool = False) -> int:
    """What would train on a model without weights, built from `model.architecture`."""
    host, task = empty_host(run)
    if run.method.num_chosen is None:
        with streams.stream(run.seed, "init"):
            host.add(run.method)
    found = describe.count(run, host, task, quiet=as_json)
    if as_json:
        print(json.dumps(found, indent=2))
    return 0


def evaluate(run: Run, cfg: DictConfig, folder: Path | None, *, as_json: bool = False) -> int:
    """Metrics on the held-out examples: of a run folder's adapter, or of the base model alone."""
    with out_of_memory():
        parts = trained_parts(run, folder)
        measure = evaluator(parts, LiveScreen().counting, lambda: None)
        if measure is None:
            raise ConfigError(
                "nothing is held out to evaluate on: set dataset.eval_samples or dataset.eval_path."
            )
        values = measure()
    assert parts.data is not None
    result = {
        "model": parts.source.name,
        "adapter": str(folder) if folder else None,
        "metrics": values,
    }
    if as_json:
        print(json.dumps({**result, "data": parts.data.hash, "dtype": str(parts.dtype)}, indent=2))
    else:
        describe.metrics(f"held-out examples: {len(parts.data.eval or [])}", {"value": values})
    return 0


def generate(
    run: Run,
    cfg: DictConfig,
    folder: Path | None,
    *,
    prompt: str | None = None,
    file: Path | None = None,
    max_new_tokens: int = 128,
    as_json: bool = False,
) -> int:
    """Answer one prompt, a file of prompts, or a person in a chat."""
    with out_of_memory():
        parts = trained_parts(run, folder, with_data=False)
        if parts.task not in ("causal_lm", "seq2seq"):
            raise ConfigError(f"a {parts.task} model does not generate; use `peft-train eval`.")
        if prompt is None and file is None:
            return chat(parts, max_new_tokens)
        return answer_all(parts, prompt, file, max_new_tokens, as_json)


def export(
    run: Run,
    cfg: DictConfig,
    folder: Path | None,
    *,
    to: str,
    output: Path,
    onto: str | None = None,
    half_reset: int | None = None,
    as_json: bool = False,
) -> int:
    """Write a run's adapter for others: as an adapter, or merged into the model, with the outputs
    compared, or as what it changes of the model's tensors. `onto` says which weights a run on
    quantised ones is merged into; `half_reset` is the seed of the half of the model's tensors that
    goes back to the base's.
    """
    if folder is None:
        raise ConfigError(
            "export needs a run folder: peft-train export RUN_FOLDER --to merged --output FOLDER"
        )
    if output.exists() and any(output.iterdir()):
        raise ConfigError(f"--output {output}: is not empty. Choose a new folder.")
    bits = stored.bits_of(run)
    is_quantised = bits != "none"
    if onto not in (None, "dequantised") and bits != run.quantization.name:
        raise ConfigError(
            f"--onto {onto}: {run.model.name_or_path} itself is stored in {bits}, and no other "
            "weights are there. Use --onto dequantised."
        )
    if onto and (to != "merged" or not is_quantised):
        raise ConfigError("--onto is for merging a run on quantised weights; leave it out.")
    if half_reset is not None and (to != "merged" or is_quantised):
        raise ConfigError("--half-reset goes with --to merged, of a run on unquantised weights.")
    if to == "delta" and is_quantised:
        raise ConfigError("--to delta is of a run on unquantised weights; take --to adapter.")
    exact = replace(
        run, model=replace(run.model, dtype="float32"), trainer=replace(run.trainer, bf16=False)
    )
    with out_of_memory():
        result: dict[str, Any] = {"to": to, "output": str(output)}
        parts = trained_parts(exact, folder, with_data=to == "merged")
        if to == "adapter":
            publish.publish(parts, output, {})
        elif to == "delta":
            publish.fold(parts.host)
            base = build(exact, with_data=False).model
            result["tensors_changed"] = publish.save_delta(parts.host, base, output)
        elif half_reset is not None:
            result |= reset_half(exact, parts, output, half_reset)
        elif is_quantised:
            result |= {"onto": onto or "dequantised"}
            result |= merge_quantised(parts, folder, output, onto or "dequantised")
        else:
            before = compare.outputs(parts)
            publish.merge(parts, output)
            result |= compare.change(before, compare.outputs(parts))
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        describe.exported(result)
    return 0


def reset_half(run: Run, parts: Parts, output: Path, seed: int) -> dict[str, Any]:
    """Write the trained model with a random half of its tensors as `run`'s base model has them;
    returns how many went back, and the change of the outputs against those of all of it.
    """
    before = compare.outputs(parts)
    publish.fold(parts.host)
    back = hft.half_reset(parts.host, build(run, with_data=False).model, seed)
    publish.save_model(parts, output)
    return {"tensors_reset": len(back), **compare.change(before, compare.outputs(parts))}


def merge_quantised(parts: Parts, folder: Path, output: Path, onto: str) -> dict[str, float]:
    """Merge the adapter of a run on quantised weights into the `original` ones, into those that it
    was trained on (`dequantised`), or quantise these again (`requantised`); returns the change of
    the outputs against those of training.
    """
    before, run = compare.outputs(parts), parts.run
    if onto == "original":
        target = trained_parts(replace(run, quantization=Quantization()), folder)
    else:
        target = trained_parts(run, folder, dequantised=True)
    publish.merge(target, output)
    if onto == "requantised":
        target.host = Host(requantised(output, run.quantization))
        attention.use_packed_attention(target.model)
        publish.save_model(target, output)
    return compare.change(before, compare.outputs(target))


def trained_parts(
    run: Run, folder: Path | None, *, with_data: bool = True, dequantised: bool = False
) -> Parts:
    """The parts of `run`, adapted by what `folder` has published; the base model alone without a
    folder. `dequantised`: see `build`.
    """
    if folder is None:
        return build(run, with_data=with_data)
    published = RunFolder(folder).adapter
    if run.method.publishes_model:  # the whole model was published
        return build(
            replace(run, model=replace(run.model, name_or_path=str(published))), with_data=with_data
        )
    parts = build(run, with_data=with_data, dequantised=dequantised)
    adapter.load(parts.host, published)
    return parts
