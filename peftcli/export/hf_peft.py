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
from peftcli.errors import DataError

PREFIX = "base_model.model."
# Fields of peft's configuration that do not change what a loaded adapter computes.
HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path revision inference_mode modules_to_save peft_type"
    " peft_version target_modules task_type ensure_weight_tying runtime_config".split()
)


# -- writing ---------------------------------------------------------------------------------------
def describe(host: Host, name: str) -> dict[str, Any]:
    """The adapter's part of `adapter_config.json`."""
    method = host.adapters[name]
    return {
        "peft_type": method.peft_type,
        "inference_mode": True,
        "target_modules": _target_names(host.model, {s.path for s in host.sites[name]}) or None,
        "modules_to_save": sorted({p.rsplit(".", 1)[-1] for p in host.saved_modules}) or None,
        **{theirs: getattr(method, ours) for ours, theirs in method.hf_fields.items()},
        **method.hf_config(host, name),
    }


def tensors(host: Host, name: str) -> dict[str, Tensor]:
    """All tensors of the adapter under peft's keys, the modules trained whole among them."""
    return _prefixed(host.adapters[name].hf_tensors(host, name)) | _modules(host)


def _prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft puts its prefix before paths of modules; a prompt stands alone."""
    return {key if key == "prompt_embeddings" else PREFIX + key: t for key, t in tensors.items()}


def _modules(host: Host) -> dict[str, Tensor]:
    found = {}
    for path in host.saved_modules:
        for key, tensor in host.model.get_submodule(path).state_dict().items():
            if not is_own(key):
                found[f"{PREFIX}{path}.{key}"] = tensor
    return found


def _target_names(model: nn.Module, paths: set[str]) -> list[str]:
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
        if cls.peft_type is not None and cls not in found.get(cls.peft_type, ()):
            found[cls.peft_type] = (*found.get(cls.peft_type, ()), cls)
    return found


def method_of(config: Mapping[str, Any], names: Iterable[str], where: Path) -> Method:
    """The method that peft's configuration means. Raises `DataError` for a type or a field that
    would be computed differently here.
    """
    kind = config.get("peft_type")
    if kind not in readable():
        raise DataError(f"{where}: peft_type {kind!r} is not one of {', '.join(readable())}.")
    cls: Any = next((c for c in readable()[kind] if c.reads_hf(config)), None)
    if cls is None:
        raise DataError(f"{where}: no method here reads this kind of {kind}.")
    odd = {
        key: value
        for key, value in config.items()
        if key not in HARMLESS | cls.hf_harmless | set(cls.hf_fields.values())
        and value not in (None, False, "none", [], {})
    }
    if odd:
        raise DataError(f"{where}: {odd} change the adapter's function and are not supported.")
    fields = {ours: config[theirs] for ours, theirs in cls.hf_fields.items() if theirs in config}
    if "target_modules" in cls.__dataclass_fields__:
        targets = config["target_modules"]
        fields["target_modules"] = targets if isinstance(targets, str) else tuple(targets)
    whole = config.get("modules_to_save") or ()  # heads of all names; a file has the model's own
    fields["modules_to_save"] = tuple(m for m in whole if any(f".{m}." in key for key in names))
    try:
        return cls(**(fields | cls.from_hf(config)))
    except ValueError as e:
        raise DataError(f"{where}: {e}") from None


@torch.no_grad()
def fill(host: Host, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy peft's tensors, checked to be those of `tensors()`, into the adapter."""
    for key, place in _modules(host).items():
        place.copy_(tensors[key])
    rest = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    host.adapters[name].load_hf(host, name, rest)
