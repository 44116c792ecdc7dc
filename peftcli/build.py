"""Putting a run's parts together: device and precision, model and tokenizer, data, host, collators,
evaluation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedConfig

from peftcli import stored
from peftcli.core.host import Host
from peftcli.data.collate import Collator, make_collator
from peftcli.data.examples import Data, Examples
from peftcli.data.prepare import prepare
from peftcli.dist import environment, strategies
from peftcli.dist.strategies import Single
from peftcli.errors import ConfigError
from peftcli.kernels import choice
from peftcli.models import attention, compiled, dropout, inputs, liger, load, tasks
from peftcli.models.head import direct_head
from peftcli.models.positions import refuse_long_rows
from peftcli.models.source import Source, cache_dir, resolve
from peftcli.settings import LABELLED, Run, Task
from peftcli.train import device, streams
from peftcli.train.estimate import Estimate
from peftcli.train.evaluate import answer_freely, evaluate
from peftcli.train.preview import Preview


@dataclass
class Parts:
    """What every verb needs of a run."""

    run: Run
    device: torch.device
    autocast: torch.dtype | None  # the products' type, where it is not float32
    source: Source
    task: Task
    tokenizer: Any  # None for images
    processor: Any  # of images; None for text
    data: Data | None
    host: Host
    packing: bool
    why_not_packed: str | None
    head: nn.Linear | None  # of a language model, where the loss can be taken in it
    strategy: Single = field(default_factory=Single)
    cost: Estimate | None = None  # once the training is planned
    bits: str = "none"  # how linears of the base are quantised: by the run, or in its files
    liger: list[str] = field(default_factory=list)  # what of the base runs in Liger's kernels

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self.host.model

    @property
    def dtype(self) -> torch.dtype:
        """The type that products run in."""
        return self.autocast or torch.float32

    def uncompiled(self) -> AbstractContextManager[None]:
        """For what is no training step: blocks that are compiled run as they are."""
        return compiled.uncompiled() if self.run.trainer.compile else nullcontext()


def build(
    run: Run, *, with_data: bool = True, dequantised: bool = False, sharding: bool = False
) -> Parts:
    """Load what `run` names, without its method: the base model on its device, the data, and how
    rows are laid out. Without `with_data` data are read only where the model's shape goes by them.
    `dequantised`: quantised weights as they are rounded, in plain linears.
    `sharding`: the model stays in the memory of the CPU until it is cut up.
    """
    stored.refuse(run, run.quantization.name)
    strategies.refuse(run)
    where = device.pick(environment.local_rank())
    cores = max(device.num_cores() // environment.num_local_ranks(), 1)
    torch.set_num_threads(run.trainer.num_threads or cores)
    choice.choose(run.trainer.kernels, where)
    autocast = _precision(run, where)
    source = resolve(run.model, cache_dir())
    config = load.load_config(source, run.model)
    bits = stored.bits_of(run, config)
    stored.refuse(run, bits)
    task = tasks.infer_task(run.model, config, run.dataset.format)
    images = task == "image_classification"
    tokenizer = None if images else inputs.load_tokenizer(source, run.model)
    processor = inputs.load_image_processor(source, run.model) if images else None
    data = None
    if with_data or task in LABELLED:
        data = prepare(run.dataset, task, tokenizer, cache_dir=cache_dir() / "data")
    dtype = _weights_dtype(run, autocast)
    with streams.stream(run.seed, "head"):  # a fresh head is drawn from the run's own seed
        loaded = load.load_model(
            source,
            run.model,
            task,
            dtype=dtype,
            labels=_classes(task, data),
            tokenizer=tokenizer,
            quantization=run.quantization,
            compute_dtype=autocast or torch.float32,
            dequantised=dequantised,
            cloze=run.method.fills_mask,
        )
    if where.type == "cpu":
        attention.use_packed_attention(loaded.model)
        dropout.use_masks(loaded.model)
    # compiled blocks are fused by the compiler
    fused_by = [] if run.trainer.compile else liger.use_liger(loaded.model, where)
    placed = torch.device("cpu") if sharding else where
    host = Host(cast(nn.Module, loaded.model).to(placed), loaded.new_modules)
    if run.trainer.gradient_checkpointing:
        host.recompute_activations()
    packing, why_not = _choose_packing(run, task, host.model)
    # with tokens laid before a row, what comes to the head is the row's own where it is chosen
    fused = task in ("causal_lm", "seq2seq") and not run.method.lays_tokens
    fused = fused or (task == "causal_lm" and _keeps(host.model))
    head = direct_head(host.model) if fused else None
    return Parts(
        run,
        where,
        autocast,
        source,
        task,
        tokenizer,
        processor,
        data,
        host,
        packing,
        why_not,
        head,
        bits=bits,
        liger=fused_by,
    )


def empty_host(run: Run, classes: int | None = None) -> tuple[Host, Task]:
    """The model that `run` names without its weights, on the meta device, and without its method:
    for counting. With `classes`, it has a fresh head for so many, which trains.

    Raises `ConfigError` where neither `model.architecture` nor the model's files say its sizes.
    """
    base = sizes_of(run)
    task = tasks.infer_task(run.model, base, "auto")
    if classes is None:
        return Host(load.empty_model(base, task, cloze=run.method.fills_mask)), task
    images = "image_classification" in tasks.offers(base)
    task = "image_classification" if images else "classification"
    model = load.empty_model(base, task, tuple(map(str, range(classes))))
    return Host(model, load.head_of(model)), task


def sizes_of(run: Run) -> PreTrainedConfig:
    """The sizes of a model: of `model.architecture`, else of its files."""
    if run.model.architecture:
        return load.config_of(run.model.architecture)
    return load.load_config(resolve(run.model, cache_dir()), run.model)


def _precision(run: Run, where: torch.device) -> torch.dtype | None:
    wanted = run.trainer.bf16
    if wanted == "auto":
        wanted = device.multiplies_bf16(where)
    return torch.bfloat16 if wanted else None


def _weights_dtype(run: Run, autocast: torch.dtype | None) -> torch.dtype:
    """Of the base's own weights: bfloat16 under bf16, unless the method trains them."""
    if run.model.dtype != "auto":
        return getattr(torch, run.model.dtype)
    return torch.float32 if run.method.trains_base else autocast or torch.float32


def _classes(task: Task, data: Data | None) -> tuple[str, ...] | None:
    """Names of the classes that a head tells apart; None for the other tasks."""
    return data.labels if data and task in LABELLED else None


def _choose_packing(run: Run, task: Task, model: nn.Module) -> tuple[bool, str | None]:
    """Whether rows are packed, and why not."""
    wanted = run.dataset.packing
    if wanted is False:
        return False, "dataset.packing=false"
    reason: str | None = f"the task is {task}"
    if run.method.lays_tokens:
        reason = f"{type(run.method).__name__} lays tokens of its own before each example"
    elif not run.method.packs:
        reason = f"{type(run.method).__name__} keeps features of whole examples"
    elif task == "causal_lm":
        attention.use_packed_attention(model)
        reason = attention.can_pack(model, run.dataset.max_length)
    if wanted is True and reason:
        raise ConfigError(f"dataset.packing=true, but {reason}. Use dataset.packing=auto or false.")
    return reason is None, reason


def adapt(parts: Parts) -> None:
    """Set the run's method up on the model, drawing from the stream `init`; all ranks alike."""
    was_training, host = parts.model.training, parts.host
    host.ranks = parts.strategy.ranks
    with streams.stream(parts.run.seed, "init"):
        host.add(parts.run.method, data=preview(parts))
    if parts.data is not None and parts.task != "seq2seq":  # there of source and target together
        refuse_long_rows(host, parts.data.stats)
    if parts.run.trainer.compile:
        compiled.compile_blocks(host.model, host.layout, cache_dir() / "compiled")
    parts.model.train(was_training)


def preview(parts: Parts) -> Preview | None:
    """The first batches of the run's training; None without data."""
    if parts.data is None:
        return None
    return Preview(
        parts.model,
        parts.task,
        parts.data.train,
        training_collator(parts),
        parts.run.trainer.per_device_train_batch_size * parts.strategy.ranks.size,
        parts.run.seed,
        next(parts.model.parameters()).device,
        parts.autocast,
        parts.head,
        parts.tokenizer,
        parts.data.labels or (),
        parts.run.trainer.loss,
    )


def training_collator(parts: Parts) -> Collator:
    """How training examples become batches: with their answer choices where the loss looks at them.

    Raises `ConfigError` where it does and there are none.
    """
    choosing = parts.run.trainer.loss == "tfew"
    if choosing and (not parts.data or not parts.data.train[0].get("choices")):
        raise ConfigError(
            "trainer.loss=tfew compares answer choices, and the data have none. Name them in "
            "dataset.choices (prompts with answers), or take trainer.loss=cross_entropy."
        )
    return collator(parts, scoring=choosing)


def collator(parts: Parts, scoring: bool = False) -> Collator:
    """How the task's examples become batches; `scoring` for evaluation with answer choices."""
    config = parts.model.config
    pad = getattr(parts.tokenizer, "pad_token_id", None) or 0
    start = getattr(config, "decoder_start_token_id", None)
    pixels = None
    if parts.processor is not None:
        pixels = lambda images: inputs.pixels(parts.processor, images)  # noqa: E731
    return make_collator(
        parts.task,
        pad=pad,
        packing=parts.packing,
        scoring=scoring,
        keeps=_keeps(parts.model),
        start=pad if start is None else start,
        pixels=pixels,
    )


def _keeps(model: nn.Module) -> bool:
    """Whether the model gives logits of some positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def evaluator(
    parts: Parts, counting: Callable[..., Any], poll: Callable[[], None]
) -> Callable[[], dict[str, float]] | None:
    """Evaluation of the model as it is on the held-out examples; None where there are none."""
    if parts.data is None or parts.data.eval is None or not len(parts.data.eval):
        return None
    held_out = parts.data.eval
    collate = collator(parts, scoring=True)

    def run() -> dict[str, float]:
        with (
            parts.uncompiled(),
            counting("evaluating", len(held_out)) as advance,
            torch.autocast(parts.device.type, parts.autocast, enabled=parts.autocast is not None),
        ):

            def tick(n: int) -> None:
                advance(n)
                poll()

            size = parts.run.trainer.per_device_eval_batch_size
            values = evaluate(
                parts.model,
                parts.task,
                held_out,
                held_out.lengths,
                collate,
                size,
                tick,
                parts.strategy.ranks,
            )
            if parts.run.trainer.generate_samples:
                values |= _answers(parts, held_out, tick)
        return values

    return run


def _answers(parts: Parts, held_out: Examples, tick: Callable[[int], None]) -> dict[str, float]:
    """Free answers to the first few prompts, at most twice as long as the longest right one."""
    if parts.task not in ("causal_lm", "seq2seq"):
        raise ConfigError(
            f"trainer.generate_samples: a {parts.task} model does not generate. Set it to 0."
        )
    few = [held_out[i] for i in range(min(parts.run.trainer.generate_samples, len(held_out)))]
    longest = int(held_out.num_supervised[: len(few)].max())
    return answer_freely(
        parts.model, parts.tokenizer, few, 2 * longest, parts.task == "seq2seq", lambda n: tick(0)
    )
