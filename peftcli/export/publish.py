"""What a run leaves for others: the adapter (or, where the base itself was trained, the model) with
its card.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from peftcli.build import Parts
from peftcli.core.host import Host
from peftcli.errors import ConfigError, DataError
from peftcli.export import adapter
from peftcli.models.quiet import quiet

DELTA = "delta.safetensors"
BIAS_SWITCHES = ("attention_bias", "mlp_bias", "use_bias", "qkv_bias")  # of configurations


def publish(parts: Parts, folder: Path, metrics: Mapping[str, float]) -> int:
    """Write the trained adapter, or the whole trained model, into `folder`, with tokenizer and
    card; returns its bytes. Raises `DataError` where it cannot be written: what was there stays.
    """
    aside = folder.with_name(f".{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        return _publish(parts, folder, aside, metrics)
    except (OSError, SafetensorError) as e:
        raise DataError(
            f"cannot write {folder}: {getattr(e, 'strerror', None) or e}. With room, `peft-train "
            f"{parts.run.run_dir}` writes it from the newest checkpoint."
        ) from e
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _publish(parts: Parts, folder: Path, aside: Path, metrics: Mapping[str, float]) -> int:
    if parts.run.method.publishes_model:
        save_model(parts, aside)
        num_bytes = sum(p.stat().st_size for p in aside.glob("*.safetensors"))
    else:
        base = parts.run.model.name_or_path
        num_bytes = adapter.save(
            parts.host, "default", aside, parts.task, base, parts.run.model.revision
        )
        _save_tokenizer(parts, aside)
    (aside / "README.md").write_text(card(parts, metrics), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return num_bytes


def save_model(parts: Parts, folder: Path) -> None:
    """The whole model without grafts, as transformers reads it."""
    with parts.host.bare() as model, quiet():
        attention = model.config._attn_implementation
        model.config._attn_implementation = "sdpa" if attention.startswith("peftcli") else attention
        model.save_pretrained(folder)
        model.config._attn_implementation = attention
    _save_tokenizer(parts, folder)


def _save_tokenizer(parts: Parts, folder: Path) -> None:
    for part in (parts.tokenizer, parts.processor):
        if part is not None:
            part.save_pretrained(folder)


def merge(parts: Parts, folder: Path) -> None:
    """Fold the adapter, if the run's model was not published whole, into the weights, in float32,
    and save the plain model.
    """
    fold(parts.host)
    save_model(parts, folder)


def save_delta(host: Host, base: nn.Module, folder: Path) -> int:
    """Write {name: tuned - base} of every parameter that changed, in float32, as
    `delta.safetensors`; what the base does not have (a bias that merging added) was zero there.
    Returns how many there are.
    """
    held, changes = dict(base.named_parameters()), {}
    with host.bare() as model:
        for name, tuned in model.named_parameters():
            start = held[name].float() if name in held else torch.zeros(())
            if (change := (tuned.detach().float() - start).cpu()).any():
                changes[name] = change.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(changes, folder / DELTA, metadata={"format": "pt"})
    return len(changes)


def fold(host: Host) -> None:
    """Fold the active adapters into the weights; the configuration names what biases they add."""
    for name in host.active:
        host.adapters[name].before_merge(host, name)
    host.merge()
    declare_biases(host)


def declare_biases(host: Host) -> None:
    """Let the model's configuration name the biases that merging added, so that they are read back.

    Linears that a switch of the configuration covers too get a bias of zero. Raises `ConfigError`
    where the architecture has no place for them: a saved file would lose them silently.
    """
    with host.bare() as bare:
        model: Any = bare
        held, known = set(model.state_dict()), _declared(model, model.config)
        if not held - known:
            return
        config = copy.deepcopy(model.config)
        for switch in BIAS_SWITCHES:
            if hasattr(config, switch):
                setattr(config, switch, True)
        declared = _declared(model, config)
        if lost := sorted(held - declared):
            raise ConfigError(
                f"merging gives {len(lost)} modules a bias ({lost[0]}, ...) that a "
                f"{type(model).__name__} has no place for; keep the adapter apart (--to adapter)."
            )
        for key in declared - held:
            module = model.get_submodule(key.removesuffix(".bias"))
            zeros = torch.zeros(module.weight.shape[0], dtype=module.weight.dtype)
            module.bias = nn.Parameter(zeros.to(module.weight.device), requires_grad=False)
        model.config = config


def _declared(model: Any, config: Any) -> set[str]:
    """Names of the tensors that a model of this configuration has."""
    with torch.device("meta"):
        return set(type(model)(config).state_dict())


def _loading(parts: Parts) -> tuple[str, str]:
    """(library, call) that reads what was published."""
    if parts.run.method.publishes_model:
        return "transformers", f"{type(parts.model).__name__}.from_pretrained(FOLDER)"
    if parts.host.adapters["default"].hf_refuses(parts.host, "default"):
        return "peftcli", "peft-train eval RUN_FOLDER"
    return "peft", "PeftModel.from_pretrained(base, FOLDER)"


def card(parts: Parts, metrics: Mapping[str, float]) -> str:
    """A model card: what it is, on what, how well, how to load it."""
    run = parts.run
    trained, total = parts.host.num_parameters()
    measured = "\n".join(f"| {k} | {v:.4f} |" for k, v in metrics.items())
    library, load = _loading(parts)
    base_line = (
        f"base_model: {run.model.name_or_path}\n" if ":" not in run.model.name_or_path else ""
    )
    return (
        f"---\nlibrary_name: {library}\n{base_line}tags:\n- peftcli\n---\n\n# "
        f"{run.name}\n\n{type(run.method).__name__} on {run.model.name_or_path}, data "
        f"{run.dataset.path or 'mixture'}, seed {run.seed}. {trained:,} of {total:,} parameters "
        f"trained.\n\n| held-out metric | value |\n|---|---|\n{measured}\n\nLoad with `{load}`, or "
        "`peft-train generate RUN_FOLDER`.\n"
    )
