"""Adapters in Hugging Face peft's format, both ways: `adapter_config.json` and
`adapter_model.safetensors`.

What a method has in common with peft it declares (`peft_type`, `hf_fields`, the `hf_*` hooks); this
file writes it down and reads it back. `adapter.py` beside it chooses between this and our own.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcli import cards
from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.core.method import Method
from peftcli.errors import ConfigError, DataError

PREFIX = "base_model.model."
# peft keeps these on its model, not in it: no targets, and another prefix for whole modules.
PROMPTS = frozenset(
    "PROMPT_TUNING P_TUNING PREFIX_TUNING CPT MULTITASK_PROMPT_TUNING CARTRIDGE".split()
)
# Fields of peft's configuration that do not change what a loaded adapter computes.
HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path revision inference_mode modules_to_save peft_type"
    " peft_version target_modules task_type ensure_weight_tying runtime_config".split()
)


# -- writing ---------------------------------------------------------------------------------------
def describe(host: Host, name: str) -> dict[str, Any]:
    """The adapter's part of `adapter_config.json`."""
    method = host.adapters[name]
    paths = {s.path for s in host.sites[name]}
    targets = {"target_modules": target_names(host.model, paths) or None}
    return {
        "peft_type": method.peft_type,
        "inference_mode": True,
        **({} if method.peft_type in PROMPTS else targets),  # peft's prompts have none
        "modules_to_save": sorted({p.rsplit(".", 1)[-1] for p in host.saved_modules}) or None,
        **{theirs: getattr(method, ours) for ours, theirs in method.hf_fields.items()},
        **method.hf_config(host, name),
    }


def tensors(host: Host, name: str) -> dict[str, Tensor]:
    """All tensors of the adapter under peft's keys, the modules trained whole among them."""
    return _prefixed(host.adapters[name].hf_tensors(host, name)) | _modules(host, name)


def _prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft puts its prefix before paths of modules; prompts and what tuners share stand alone."""
    alone = ("prompt_", "base_model.")
    return {key if key.startswith(alone) else PREFIX + key: t for key, t in tensors.items()}


def _modules(host: Host, name: str) -> dict[str, Tensor]:
    """Modules trained whole; peft wraps nothing around the model of a prompt."""
    prefix = "base_model." if host.adapters[name].peft_type in PROMPTS else PREFIX
    found = {}
    for path in host.saved_modules:
        for key, tensor in host.model.get_submodule(path).state_dict().items():
            if not is_own(key):
                found[f"{prefix}{path}.{key}"] = tensor
    return found


def target_names(model: nn.Module, paths: set[str]) -> list[str]:
    """The shortest names that mean exactly these modules: last names where all modules of that name
    are meant.
    """
    names = {p.rsplit(".", 1)[-1] for p in paths}
    meant = {p for p, _ in model.named_modules() if p.rsplit(".", 1)[-1] in names and not is_own(p)}
    return sorted(names if meant == paths else paths)


# -- reading ---------------------------------------------------------------------------------------
@cache
def readable() -> dict[str, tuple[type[Method], ...]]:
    """The methods that read each of peft's types, found through the files of `configs/method/`."""
    found: dict[str, tuple[type[Method], ...]] = {}
    for card in cards.cards("method"):
        module, _, name = card.target.rpartition(".")
        cls: type[Method] = getattr(importlib.import_module(module), name)
        if cls.family == "bridge":
            continue  # reads what no other does
        for kind in (cls.peft_type, *cls.also_reads):
            if kind is not None and cls not in found.get(kind, ()):
                found[kind] = (*found.get(kind, ()), cls)
    return found


def method_of(config: Mapping[str, Any], names: Iterable[str], where: Path) -> Method:
    """The method that peft's configuration means. Raises `DataError` for a type or a field that
    would be computed differently here.
    """
    kind, reason = config["peft_type"], ""
    for cls in readable().get(kind, ()):
        if cls.reads_hf(config):
            try:
                return _native(cls, config, names)
            except ValueError as e:
                reason = str(e)
                break
    try:
        return _bridged(config, names)
    except ConfigError as e:
        raise DataError(f"{where}: {reason or e}") from None


def _native(cls: type[Method], config: Mapping[str, Any], names: Iterable[str]) -> Method:
    """Our own method of these fields. Raises ValueError where it would compute something else."""
    odd = {
        key: value
        for key, value in config.items()
        if key not in HARMLESS | cls.hf_harmless | set(cls.hf_fields.values())
        and value not in (None, False, "none", [], {})
    }
    if odd:
        raise ValueError(f"{odd} change the adapter's function and are not supported.")
    fields = {ours: config[theirs] for ours, theirs in cls.hf_fields.items() if theirs in config}
    if "target_modules" in cls.__dataclass_fields__:
        targets = config["target_modules"]
        fields["target_modules"] = targets if isinstance(targets, str) else tuple(targets)
    fields["modules_to_save"] = _whole(config, names)
    return cls(**(fields | cls.from_hf(config)))


def _bridged(config: Mapping[str, Any], names: Iterable[str]) -> Method:
    """Any tuner of the installed peft, computed by peft itself."""
    from peftcli.methods.hf_peft import HFPeft

    return HFPeft(modules_to_save=_whole(config, names), **HFPeft.from_hf(config))


def _whole(config: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    """The modules trained whole: peft names heads of all kinds, a file holds the model's own."""
    whole = config.get("modules_to_save") or ()
    return tuple(m for m in whole if any(f".{m}." in key for key in names))


@torch.no_grad()
def fill(host: Host, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy peft's tensors, checked to be those of `tensors()`, into the adapter."""
    for key, place in _modules(host, name).items():
        place.copy_(tensors[key])
    rest = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    host.adapters[name].load_hf(host, name, rest)
