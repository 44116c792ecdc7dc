"""What a run needs of memory and disk: before it starts, and when memory ran out."""

from __future__ import annotations

import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from peftcli.build import Parts, preview
from peftcli.data.collate import Batch, Example
from peftcli.dist import strategies
from peftcli.errors import ConfigError, OutOfMemory
from peftcli.export import adapter
from peftcli.screen import size
from peftcli.settings import Run
from peftcli.train import device, optim, probe, streams
from peftcli.train import estimate as estimates
from peftcli.train.estimate import Estimate, Held, Load, Memory
from peftcli.train.folder import RunFolder
from peftcli.train.plan import Plan
from peftcli.train.preview import Preview
from peftcli.train.rotation import bytes_of


# -- before it starts ------------------------------------------------------------------------------
def estimate(parts: Parts, plan: Plan, optimizer: Optimizer) -> Estimate:
    """What one process of the run holds, checkpoints and time; takes no time itself."""
    assert parts.data is not None
    run, host, ranks = parts.run, parts.host, num_ranks(parts.run, plan)
    lengths, state = parts.data.train.lengths, optim.state_bytes(optimizer)
    per_step = max(1, int(lengths.sum()) * plan.batch // len(lengths))
    recompute = run.trainer.gradient_checkpointing
    return Estimate(
        estimates.held(
            host,
            parts.device,
            state,
            ranks,
            strategies.shards(run),
            strategies.num_divided(run, host),
        ),
        estimates.checkpoint_bytes(host, state),
        estimates.seconds(host, parts.device, parts.dtype, per_step, plan.total, recompute, ranks),
    )


def measure(parts: Parts, plan: Plan, held: Held, *, whole: bool = False) -> Memory:
    """The peak of the run's heaviest step, by a forward and backward pass on one and on two of its
    examples; where weights are cut up, by the model's dimensions. `whole`: on the CPU, with a pass
    on all of them, which tells how the system's allocator scatters them in memory.
    """
    look, run = preview(parts), parts.run
    assert look is not None
    examples = heaviest(parts, plan)
    if strategies.shards(run):
        recompute = run.trainer.gradient_checkpointing
        working = probe.by_dimensions(parts.model, parts.dtype, recompute)
    else:
        with parts.uncompiled():
            working = probe.measure(look, examples)
    batch = look.collate(examples)
    load = Load(
        tokens=probe.num_elements(batch),
        targets=len(batch.targets),
        accumulates=run.trainer.gradient_accumulation_steps > 1,
        in_blocks=parts.head is not None,
    )
    memory = Memory(held, working, load)
    if whole and parts.device.type == "cpu" and not strategies.shards(run):
        return _spread(parts, look, batch, memory)
    return memory


def _spread(parts: Parts, look: Preview, batch: Batch, memory: Memory) -> Memory:
    """The estimate with what the allocator makes of it, where the pass fits for sure."""
    if 2 * memory.total > device.available_memory(parts.device):
        return memory
    held = memory.held
    with parts.uncompiled():
        peak, kept = device.growth(lambda: probe.run(look, batch))
    process = device.resident_memory() - held.weights - held.deltas  # libraries keep what they made
    spread = max((peak - kept) / memory.passing, 1.0)
    return replace(memory, held=replace(held, process=max(process, held.process)), spread=spread)


def num_ranks(run: Run, plan: Plan) -> int:
    """Processes that share a step."""
    each = run.trainer.per_device_train_batch_size * run.trainer.gradient_accumulation_steps
    return plan.batch // each


def heaviest(parts: Parts, plan: Plan) -> list[Example]:
    """The examples of a process's forward pass with the most tokens, the longest first: of the one
    that `trainer.longest_first` computes, else of the run's first epoch.
    """
    assert parts.data is not None
    run, train = parts.run, parts.data.train
    each, lengths = run.trainer.per_device_train_batch_size, train.lengths
    if run.trainer.longest_first:
        return [train[i] for i in np.argsort(-lengths, kind="stable")[:each].tolist()]
    by_length = lengths if run.dataset.group_by_length and not parts.packing else None
    order = streams.order(len(lengths), run.seed, 0, by_length, each * num_ranks(run, plan)).numpy()
    order = order[: plan.total * plan.batch]
    batches = [order[i : i + each] for i in range(0, len(order), each)]
    most = lambda rows: lengths[rows].max() * len(rows)  # noqa: E731
    size = (lambda rows: lengths[rows].sum()) if parts.packing else most
    rows = max(batches, key=size)
    return [train[i] for i in rows[np.argsort(-lengths[rows], kind="stable")].tolist()]


@dataclass(frozen=True)
class Disk:
    """Bytes that the run may take at a time beyond what its folder holds, and that there are."""

    needed: int
    free: int


def disk(parts: Parts, cost: Estimate) -> Disk:
    """Of all checkpoints that are kept, the one being written, and what is published."""
    trainer, folder = parts.run.trainer, RunFolder(Path(parts.run.run_dir))
    keeps_best = trainer.eval_steps is not None
    kept = (trainer.save_total_limit + keeps_best) * cost.checkpoint
    if trainer.keep_bytes is not None:
        kept = min(kept, max(trainer.keep_bytes, (1 + keeps_best) * cost.checkpoint))
    published = (1 + keeps_best) * adapter.num_bytes(parts.host, "default")
    there = sum(bytes_of(p) for p in (folder.checkpoints, folder.adapter, folder.best))
    above = [folder.path.absolute(), *folder.path.absolute().parents]
    free = shutil.disk_usage(next(p for p in above if p.exists())).free
    return Disk(max(kept + cost.checkpoint + published - there, 0), free)


def refuse_full_disk(parts: Parts, cost: Estimate) -> None:
    """Raises `ConfigError` where the run's checkpoints do not fit on their disk."""
    found, trainer = disk(parts, cost), parts.run.trainer
    if found.free < found.needed:
        raise ConfigError(
            f"run_dir={parts.run.run_dir}: {size(found.free)} free on that disk, and the run needs "
            f"{size(found.needed)}: checkpoints of {size(cost.checkpoint)}, "
            f"trainer.save_total_limit={trainer.save_total_limit} kept, one being written, and "
            "what is published. Choose another run_dir, or keep less: trainer.save_total_limit=1, "
            "trainer.keep_bytes=BYTES."
        )


def in_words(held: Held, memory: Memory | None = None) -> str:
    """The parts, and with a measured peak the sum."""
    parts = {
        "the program": held.process,
        "weights": held.weights,
        "deltas": held.deltas,
        "gradients": held.gradients,
        "optimizer": held.optimizer,
    }
    if memory is not None:
        parts |= {
            "activations": memory.activations,
            "logits": memory.logits,
            "gaps between them": memory.gaps,
        }
    listed = ", ".join(f"{name} {size(n)}" for name, n in parts.items() if n)
    if memory is None:
        return f"{listed}; and activations, which `peft-train check` measures"
    return f"about {size(memory.total)} a process: {listed}"


# -- when memory ran out ---------------------------------------------------------------------------
@dataclass
class Running:
    """What is being trained, for the message."""

    parts: Parts | None = None
    plan: Plan | None = None


@contextmanager
def out_of_memory() -> Iterator[Running]:
    """Turn the allocator's failure into exit code 4, with what would need less. Yields the place
    for what is trained, once it is there.
    """
    running = Running()
    try:
        yield running
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        traceback.clear_frames(e.__traceback__)  # which hold the step's tensors
        raise OutOfMemory(advice(e, running)) from None


def is_out_of_memory(e: BaseException) -> bool:
    """Whether it is the allocator of the CPU or of the GPU that failed."""
    said = ("can't allocate memory", "out of memory")
    return isinstance(e, torch.OutOfMemoryError | MemoryError) or any(s in str(e) for s in said)


def advice(e: BaseException, running: Running) -> str:
    """What was held at most, what a step takes by measurement, and what to change."""
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    peak, parts = device.peak_memory(device.current()), running.parts
    said = f"out of memory: {reason}\nheld at most  {size(peak)}"
    if parts is None or parts.cost is None or running.plan is None:
        return (
            f"{said}, before the training was planned. Smaller weights need less: "
            "model.dtype=bfloat16, quantization=nf4, or another model."
        )
    try:
        memory = measure(parts, running.plan, parts.cost.held)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as again:
        if not is_out_of_memory(again):
            raise
        return (
            f"{said}\nheld always   {in_words(parts.cost.held)}\nand two examples do not fit: "
            "trainer.gradient_checkpointing=true, a smaller dataset.max_length, quantization=nf4, "
            "or another model need less."
        )
    options = sorted(changes(parts, memory, peak), key=lambda option: option[1] > peak)
    lines = [f"  {words}: about {size(need)}" for words, need in options[:3]]
    words = in_words(parts.cost.held, memory)
    return "\n".join([f"{said}\nestimated     {words}", "each needs less:", *lines])


def changes(parts: Parts, memory: Memory, room: int) -> list[tuple[str, int]]:
    """(what to type, bytes that it would need), the gentlest first; of smaller batches the largest
    that fits in `room`.
    """
    trainer, found = parts.run.trainer, []
    each, times = trainer.per_device_train_batch_size, trainer.gradient_accumulation_steps
    divisors = [n for n in range(2, each + 1) if each % n == 0]
    if divisors:
        fitting = (n for n in divisors if memory.at(1 / n).total <= room)
        divisor = next(fitting, divisors[-1])
        words = (
            f"trainer.per_device_train_batch_size={each // divisor} "
            f"trainer.gradient_accumulation_steps={times * divisor} (the same result)"
        )
        found.append((words, memory.at(1 / divisor).total))
    if not trainer.gradient_checkpointing:
        words = "trainer.gradient_checkpointing=true (a third more time)"
        found.append((words, recomputed(parts, memory).total))
    words = f"dataset.max_length={parts.run.dataset.max_length // 2} dataset.on_overlong=truncate"
    found.append((words, memory.at(0.5).total))
    if parts.bits == "none" and parts.run.method.on_quantised:
        found.append(("quantization=nf4", memory.total - spared_by_four_bits(parts.model)))
    return found


def recomputed(parts: Parts, memory: Memory) -> Memory:
    """With activations computed again: a row of each block stays, and for a moment all of one."""
    kept, all_of_them = (
        probe.by_dimensions(parts.model, parts.dtype, again).saved.slope for again in (True, False)
    )
    share = kept / all_of_them + 1 / max(len(parts.host.layout.blocks), 1)
    saved = memory.working.saved
    less = replace(saved, constant=saved.constant * share, slope=saved.slope * share)
    return replace(memory, working=replace(memory.working, saved=less))


def spared_by_four_bits(model: nn.Module) -> int:
    """Bytes that frozen linears would no longer take, at 4.5 bits a weight with its scales."""
    frozen = [
        m.weight for m in model.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad
    ]
    return round(sum(w.nbytes - w.numel() * 4.5 / 8 for w in frozen))
