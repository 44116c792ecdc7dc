"""A run in words and numbers: the plan before it, the results after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.text import Text
from torch.optim import Optimizer

from peftcli import budget
from peftcli.build import Parts
from peftcli.core import weights
from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.data.examples import Data
from peftcli.dist import ds_config
from peftcli.export import adapter
from peftcli.screen import console, duration, facts, grid, size
from peftcli.settings import DeepSpeed, Run, Task
from peftcli.train import device
from peftcli.train.estimate import Estimate, Memory
from peftcli.train.folder import RunFolder
from peftcli.train.plan import Plan, Progress

LEFT_OUT = (
    "data, a fresh head, memory and time: the weights of {} are not on this machine; only the "
    "dimensions in model.architecture were used"
)


def plan(
    parts: Parts,
    steps: Plan,
    optimizer: Optimizer,
    *,
    measured: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """What is about to happen, on the screen and as plain data. `measured`: with the memory of a
    step, which takes a few examples through the model.
    """
    assert parts.data is not None
    trained, total = parts.host.num_parameters()
    parts.cost = budget.estimate(parts, steps, optimizer)
    memory = budget.measure(parts, steps, parts.cost.held, whole=True) if measured else None
    blocks = {
        "model": _model(parts, trained, total),
        "data": _data(parts, parts.data.stats),
        "training": _training(parts, steps, parts.cost, memory),
    }
    if not quiet:
        for title, rows in blocks.items():
            facts(title, {k: _shown(v) for k, v in rows.items()})
    budget.refuse_full_disk(parts, parts.cost)
    return blocks


def count(run: Run, host: Host, task: Task, quiet: bool = False) -> dict[str, Any]:
    """What would train on a model that is known by its dimensions alone, on the screen and as
    plain data.
    """
    total, about = host.num_parameters()[1], run.method.num_chosen
    if about is None:
        found, counts = _counted(host)
    else:
        found = {"trained": f"about {about:,} parameters; the task's data choose which"}
        counts = {"trained_parameters_about": about, "all_parameters": total}
    found = {
        "model": f"{run.model.architecture['model_type']} by its dimensions,"
        f" {total - _added(host):,} parameters",
        "task": task,
        "method": f"{type(run.method).__name__} {_options(run.method)}".strip(),
        **found,
        "left out": LEFT_OUT.format(run.model.name_or_path),
    }
    if not quiet:
        facts("model", found)
    return {"model": found, "counts": counts}


def _counted(host: Host) -> tuple[dict[str, Any], dict[str, Any]]:
    """What trains on an adapted model, in words and in numbers."""
    trained, total = host.num_parameters()
    roles, published = by_role(host), adapter.num_bytes(host, "default")
    found = {
        "sites": _sites(host),
        "trained": f"{trained:,} parameters, {trained / total:.4%} of all",
        "by role": _shown(roles),
        "published": size(published),
    }
    counts = {
        "trained_parameters": trained,
        "all_parameters": total,
        "share": trained / total,
        "trained_by_role": roles,
        "sites": len(host.sites["default"]),
        "published_bytes": published,
    }
    return found, counts


def by_role(host: Host) -> dict[str, int]:
    """How many parameters train, by the role of the module that they are in."""
    found: Counter[str] = Counter()
    for name, parameter in host.trained().items():
        found[_role(host, name)] += parameter.numel()
    return dict(found.most_common())


def _role(host: Host, name: str) -> str:
    """The role of a parameter's module: `q`, `norm`, ...; `shared` of what several deltas use."""
    path, *rest = f".{name}".split(".deltas.", 1)
    path = path.strip(".") if rest else name.rpartition(".")[0]
    if is_own(name) and not rest:
        return "shared"
    if rest and (part := rest[0].split(".")[1:3])[0] == "parts" and len(part) == 2:
        return part[1]  # of one role of a fused linear
    roles = host.layout.roles_of(path)
    return "+".join(roles) or host.layout.role_of(path) or path.rpartition(".")[2] or "model"


def _sites(host: Host) -> str:
    roles = Counter(s.role or s.kind for s in host.sites["default"])
    return ", ".join(f"{role} x{n}" for role, n in roles.items()) or "the base's own weights"


def _storage(parts: Parts) -> str:
    """How the frozen weights lie in memory."""
    quantised = [m for m in parts.model.modules() if weights.is_quantised(m)]
    plain = Counter(
        str(p.dtype).removeprefix("torch.")
        for p in parts.model.parameters()
        if p.is_floating_point() and not p.requires_grad
    )
    rest = " and ".join(plain) or "float32"
    if not quantised:
        return rest
    return f"{parts.bits} ({len(quantised)} linears), the rest {rest}"


def _model(parts: Parts, trained: int, total: int) -> dict[str, Any]:
    run, host = parts.run, parts.host
    return {
        "model": f"{parts.source.name} ({parts.source.kind}), {total - _added(host):,} parameters",
        "task": parts.task,
        "method": f"{type(run.method).__name__} {_options(run.method)}".strip(),
        "sites": _sites(host),
        "targets": ", ".join(f"{k}: {n}" for k, n in host.matched["default"].items()),
        "trained": f"{trained:,} parameters, {trained / total:.2%}"
        + (f", with {', '.join(host.saved_modules)} whole" if host.saved_modules else ""),
        "by role": _shown(by_role(host)),
        "stored in": _storage(parts),
        "device": device.describe(parts.device),
        "products in": str(parts.dtype).removeprefix("torch."),
        **({"in Liger's kernels": ", ".join(parts.liger)} if parts.liger else {}),
    }


def _data(parts: Parts, stats: Mapping[str, Any]) -> dict[str, Any]:
    """Where the examples come from, how many there are, and what of them is trained on."""
    rows = {
        "from": ", ".join(
            f"{s['path']} ({s['format']}, {s['rows']:,} "
            f"rows{f', {n:,} unclear left out' if (n := s['unclear']) else ''})"
            for s in stats["sources"]
        )
    }
    for side, name in (("train", "training"), ("eval", "held out")):
        if stats[side]:
            rows[name] = _side(stats[side])
    rows["layout"] = (
        "packed, no padding" if parts.packing else f"padded rows ({parts.why_not_packed})"
    )
    how = "from the cache" if stats["cached"] else "prepared"
    rows["ready"] = f"{how} in {duration(stats['seconds'])}"
    return rows | {f"note {i}": note for i, note in enumerate(stats["notes"], 1)}


def _side(counts: Mapping[str, Any]) -> str:
    """One side's counts in a line."""
    said = [f"{counts['examples']:,} examples"]
    if counts.get("tokens"):
        said.append(
            f"{counts['tokens']:,} tokens (mean {counts['mean_length']:.0f}, longest "
            f"{counts['max_length']})"
        )
    if counts.get("supervised_fraction"):
        said.append(f"{counts['supervised_fraction']:.1%} of them targets")
    for key in ("dropped_overlong", "dropped_without_targets", "truncated"):
        if counts.get(key):
            said.append(f"{counts[key]:,} {key.replace('_', ' ')}")
    if counts.get("labels"):
        said.append(_shown(counts["labels"]))
    return ", ".join(said)


def _added(host: Any) -> int:
    return sum(p.numel() for n, p in host.model.named_parameters() if is_own(n))


def _options(method: Any) -> str:
    """The fields that are not at their defaults, as the user would write them."""
    values = {k: v for k, v in vars(method).items() if v != getattr(type(method), k, None)}
    values = {k: v for k, v in values.items() if v not in ({}, ())}
    words = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in values.items()}
    return " ".join(f"{k}={v}" for k, v in words.items())


def _training(parts: Parts, steps: Plan, cost: Estimate, memory: Memory | None) -> dict[str, Any]:
    run, disk = parts.run, budget.disk(parts, cost)
    return {
        "steps": f"{steps.total} optimizer steps of {steps.batch} examples,"
        f" {steps.steps_per_epoch} an epoch",
        "optimizer": f"{run.optimizer.cls.rpartition('.')[2]} lr={run.optimizer.lr:g},"
        f" {run.scheduler.name} schedule",
        "processes": f"{budget.num_ranks(run, steps)}, strategy={run.strategy.name}",
        **_without_effect(run),
        "memory": f"{budget.in_words(cost.held, memory)}; free "
        f"{size(device.available_memory(parts.device))}",
        "disk": f"{size(cost.checkpoint)} a checkpoint, at most {size(disk.needed)} at a time;"
        f" free {size(disk.free)}",
        "time": f"about {duration(cost.seconds)} of training",
        "seed": run.seed,
        "run_dir": run.run_dir,
    }


def _without_effect(run: Run) -> dict[str, str]:
    """What of a DeepSpeed file the loop does itself."""
    unused = ds_config.unused(run.strategy) if isinstance(run.strategy, DeepSpeed) else []
    return {"no effect": f"of strategy.config: {', '.join(unused)}"} if unused else {}


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def preview(data: Data, count: int = 2) -> None:
    """A few examples as the model reads them, with what is trained on in reverse."""
    for example in data.preview(count):
        text = Text(f"example {example.id}\n", style="bold")
        for piece in example.pieces:
            text.append(piece.text, style="green reverse" if piece.supervised else "not bold dim")
        if example.label is not None:
            text.append(f"  -> {example.label}", style="green")
        console.print(text, end="\n\n")


def metrics(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    """Metrics as a table, one column each."""
    names = list(dict.fromkeys(name for values in columns.values() for name in values))
    rows = [[name, *(values.get(name, "") for values in columns.values())] for name in names]
    grid(title, ["", *columns], rows)


def results(parts: Parts, progress: Progress, folder: RunFolder, file_size: int) -> None:
    """What came out, and where everything was written."""
    if progress.last:
        shown = {"before": progress.first, "after": progress.last}
        metrics("held-out results", {k: v for k, v in shown.items() if v})
    what = "model" if parts.run.method.publishes_model else "adapter"
    facts(
        "written",
        {
            what: f"{folder.adapter} ({size(file_size)})",
            "metrics": f"{folder.metrics}, {folder.result}",
            "training": f"{duration(progress.seconds)},"
            f" {progress.tokens / max(progress.seconds, 1e-9):,.0f} tokens/s,"
            f" peak memory {size(device.peak_memory(parts.device))}",
            "try it": f"peft-train generate {folder.path}",
            "merge it": f"peft-train export {folder.path} --to merged --output FOLDER",
        },
    )


def exported(result: Mapping[str, Any]) -> None:
    """What was written where, and what merging did to the outputs."""
    facts("exported", {k: v for k, v in result.items()})
