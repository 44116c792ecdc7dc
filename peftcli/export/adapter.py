"""An adapter's folder: `adapter_config.json` and `adapter_model.safetensors`, in the format of
Hugging Face peft where it has the method, else in our own under the same two names.

Our own names the method with all its fields and holds its part of the state as it is; its
`peft_type` is `PEFTCLI_<NAME>`, so that no other tool takes it for one of peft's.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftcli import config as typed_config
from peftcli.core.host import Host
from peftcli.core.method import Method
from peftcli.errors import ConfigError, DataError, NonFinite
from peftcli.export import hf_peft
from peftcli.settings import Task
from peftcli.train.folder import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN = "PEFTCLI_"
FORMAT = 1  # of our own; peft's has no number
TASK_TYPES: dict[Task, str | None] = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "image_classification": None,
}


# -- writing ---------------------------------------------------------------------------------------
def save(
    host: Host, name: str, folder: Path, task: Task, base: str, revision: str | None = None
) -> int:
    """Write the adapter `name` into `folder`; returns the bytes of its weights.

    Raises `NonFinite` where a tensor is not finite: such an adapter is never published.
    """
    places, own = _places(host, name)
    tensors = {k: t.detach().cpu().contiguous().clone() for k, t in places.items()}
    broken = [k for k, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if broken:
        raise NonFinite(
            f"the adapter has non-finite numbers in {broken[:3]}; it was not published."
        )
    config = {
        "task_type": TASK_TYPES[task],
        "base_model_name_or_path": base,
        "revision": revision,
        **(_describe(host, name) if own else hf_peft.describe(host, name)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{WEIGHTS}"
    save_file(tensors, aside, metadata={"format": "pt"})
    _check(aside, tensors)
    aside.replace(folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    return (folder / WEIGHTS).stat().st_size


def num_bytes(host: Host, name: str) -> int:
    """Bytes of the weights that would be published: of the adapter, or of the whole model."""
    if host.adapters[name].publishes_model:
        return sum(p.numel() * p.element_size() for p in host.model.parameters())
    return sum(t.numel() * t.element_size() for t in _places(host, name)[0].values())


def _places(host: Host, name: str) -> tuple[dict[str, Tensor], bool]:
    """The live tensors of the adapter under the names of its file, and whether these are ours."""
    own = host.adapters[name].hf_refuses(host, name) is not None
    return (host.adapter_state(name) if own else hf_peft.tensors(host, name)), own


def _describe(host: Host, name: str) -> dict[str, Any]:
    method = host.adapters[name].published(host, name)
    cls = type(method)
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    return {
        "peft_type": f"{OWN}{cls.__module__.rpartition('.')[2].upper()}",
        "format": FORMAT,
        "not_peft": method.hf_refuses(host, name),
        "method": {"_target_": f"{cls.__module__}.{cls.__qualname__}", **fields},
        "modules_to_save": list(host.saved_modules) or None,
    }


def _check(path: Path, tensors: Mapping[str, Tensor]) -> None:
    read = load_file(path)
    same = read.keys() == tensors.keys() and all(torch.equal(read[k], tensors[k]) for k in tensors)
    if not same:
        raise DataError(f"{path} reads back differently from what was written. Is the disk sound?")


# -- reading ---------------------------------------------------------------------------------------
def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no adapter: {CONFIG} is missing.") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{folder / CONFIG} cannot be read: {e}") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise DataError(f"{folder / CONFIG}: has no peft_type.")
    return config


def load(host: Host, folder: Path, name: str = "default") -> None:
    """Add the adapter in `folder` to the model under `name`. Every tensor of the file must find its
    place, and every place its tensor; otherwise `DataError`.
    """
    config = read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise DataError(f"{folder} holds no adapter: {WEIGHTS} is missing.") from None
    except (OSError, SafetensorError) as e:
        raise DataError(f"{folder / WEIGHTS} is damaged: {e}") from None
    own = config["peft_type"].startswith(OWN)
    method = (
        _own_method(config, folder / CONFIG)
        if own
        else hf_peft.method_of(config, tensors, folder / CONFIG)
    )
    if not own:
        tensors = method.hf_acting(config, tensors)
    host.add(method, name)
    if own:
        for path in config.get("modules_to_save") or ():
            host.train_module(path)
    places = host.adapter_state(name) if own else hf_peft.tensors(host, name)
    _compare(places, tensors, folder / WEIGHTS)
    if own:
        with torch.no_grad():
            for key, place in places.items():
                place.copy_(tensors[key])
    else:
        hf_peft.fill(host, name, tensors)


def _own_method(config: Mapping[str, Any], where: Path) -> Method:
    if (version := config.get("format", FORMAT)) not in range(FORMAT + 1):
        raise DataError(
            f"{where} was written by a newer peftcli (format {version}; this one reads up to "
            f"{FORMAT}). Update peftcli to read it."
        )
    try:
        return typed_config.method_of(config["method"])
    except (KeyError, ConfigError) as e:
        raise DataError(f"{where}: {e}") from None


def _compare(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> None:
    missing, extra = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
    if missing or extra:
        raise DataError(
            f"{path} does not fit this model: {_few('lacks', missing)}{_few('has unknown', extra)}"
        )
    for key, place in places.items():
        if place.shape != tensors[key].shape:
            raise DataError(
                f"{path}: {key} has shape {tuple(tensors[key].shape)}, here {tuple(place.shape)}."
            )


def _few(what: str, names: Iterable[str]) -> str:
    names = list(names)
    return (
        f"it {what} {len(names)} tensors "
        f"({', '.join(names[:2])}{', ...' if len(names) > 2 else ''}). "
        if names
        else ""
    )
