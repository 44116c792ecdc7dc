"""Adapters in Hugging Face peft's format, both ways: `adapter_config.json` and
`adapter_model.safetensors`.

What a method has in common with peft it declares (`peft_type`, `hf_fields`, `hf_module`); this file
writes it down, reads it back, and checks what it wrote against the live tensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftcli.core.graft import deltas_of
from peftcli.core.host import Host
from peftcli.core.method import Method
from peftcli.errors import DataError, NonFinite
from peftcli.methods.lora import LoRA
from peftcli.settings import Task
from peftcli.train.folder import write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
READABLE: dict[str, type[Method]] = {"LORA": LoRA}
TASK_TYPES: dict[Task, str | None] = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "regression": "SEQ_CLS",
    "image_classification": None,
}
# Fields of peft's configuration that do not change what a loaded adapter computes.
HARMLESS = frozenset(
    "auto_mapping base_model_name_or_path fan_in_fan_out inference_mode init_lora_weights revision"
    " modules_to_save peft_type peft_version target_modules task_type rank_pattern alpha_pattern r"
    " lora_alpha lora_dropout use_rslora ensure_weight_tying megatron_core loftq_config eva_config"
    " corda_config lora_ga_config runtime_config qalora_group_size".split()
)


# -- writing ---------------------------------------------------------------------------------------
def save(
    host: Host, name: str, folder: Path, task: Task, base: str, revision: str | None = None
) -> int:
    """Write the adapter `name` into `folder`; returns the bytes of its weights.

    Raises `NonFinite` where a tensor is not finite: such an adapter is never published.
    """
    method = host.adapters[name]
    tensors = {k: t.detach().cpu().contiguous().clone() for k, t in _tensors(host, name).items()}
    broken = [k for k, t in tensors.items() if not torch.isfinite(t).all()]
    if broken:
        raise NonFinite(
            f"the adapter has non-finite numbers in {broken[:3]}; it was not published."
        )
    config = {
        "peft_type": method.peft_type,
        "task_type": TASK_TYPES[task],
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "target_modules": _target_names(host.model, {s.path for s in host.sites[name]}),
        "modules_to_save": sorted({p.rsplit(".", 1)[-1] for p in host.saved_modules}) or None,
        **{theirs: getattr(method, ours) for ours, theirs in method.hf_fields.items()},
        **method.hf_config(host, name),
    }
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".{WEIGHTS}"
    save_file(tensors, aside, metadata={"format": "pt"})
    _check(aside, tensors)
    aside.replace(folder / WEIGHTS)
    write_json(folder / CONFIG, config)
    return (folder / WEIGHTS).stat().st_size


def _tensors(host: Host, name: str) -> dict[str, Tensor]:
    """All tensors of the adapter under peft's keys, the modules trained whole among them."""
    method, tensors = host.adapters[name], {}
    for path in dict.fromkeys(site.path for site in host.sites[name]):
        module = host.model.get_submodule(path)
        for key, tensor in method.hf_module(module, deltas_of(module)[name]).items():
            tensors[f"{PREFIX}{path}.{key}"] = tensor
    for path in host.saved_modules:
        for key, tensor in host.model.get_submodule(path).state_dict().items():
            if "deltas." not in key:
                tensors[f"{PREFIX}{path}.{key}"] = tensor
    return tensors


def _target_names(model: nn.Module, paths: set[str]) -> list[str]:
    """The shortest names that mean exactly these modules: last names where all modules of that name
    are meant.
    """
    names = {p.rsplit(".", 1)[-1] for p in paths}
    meant = {
        p for p, _ in model.named_modules() if p.rsplit(".", 1)[-1] in names and ".deltas." not in p
    }
    return sorted(names if meant == paths else paths)


def _check(path: Path, tensors: Mapping[str, Tensor]) -> None:
    read = load_file(path)
    same = read.keys() == tensors.keys() and all(torch.equal(read[k], tensors[k]) for k in tensors)
    if not same:
        raise DataError(f"{path} reads back differently from what was written. Is the disk sound?")


# -- reading ---------------------------------------------------------------------------------------
def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json`, checked to be one that can be loaded here."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{folder} holds no adapter: {CONFIG} is missing.") from None
    except (OSError, ValueError) as e:
        raise DataError(f"{folder / CONFIG} cannot be read: {e}") from None
    if not isinstance(config, dict) or config.get("peft_type") not in READABLE:
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise DataError(
            f"{folder / CONFIG}: peft_type {kind!r} is not one of {', '.join(READABLE)}."
        )
    odd = {
        k: v
        for k, v in config.items()
        if k not in HARMLESS and v not in (None, False, "none", [], {})
    }
    if odd:
        raise DataError(
            f"{folder / CONFIG}: {odd} change the adapter's function and are not supported."
        )
    if isinstance(config.get("init_lora_weights"), str) and config["init_lora_weights"] in (
        "pissa",
        "olora",
        "corda",
    ):
        raise DataError(
            f"{folder / CONFIG}: saved relative to a changed base "
            f"(init_lora_weights={config['init_lora_weights']!r}); convert it in peft first "
            "(path_initial_model_for_weight_conversion)."
        )
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
    host.add(_method(config, tensors), name)
    _load_tensors(host, name, tensors, folder / WEIGHTS)


def _method(config: Mapping[str, Any], tensors: Iterable[str]) -> Method:
    cls: Any = READABLE[config["peft_type"]]
    targets = config["target_modules"]
    fields = {ours: config[theirs] for ours, theirs in cls.hf_fields.items() if theirs in config}
    whole = (
        config.get("modules_to_save") or ()
    )  # peft lists heads of all names; a file has the model's own
    return cls(
        **fields,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        modules_to_save=tuple(m for m in whole if any(f".{m}." in key for key in tensors)),
        **cls.from_hf(config),
    )


@torch.no_grad()
def _load_tensors(host: Host, name: str, tensors: Mapping[str, Tensor], path: Path) -> None:
    places = _tensors(host, name)
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
        place.copy_(tensors[key])


def _few(what: str, names: Iterable[str]) -> str:
    names = list(names)
    return (
        f"it {what} {len(names)} tensors "
        f"({', '.join(names[:2])}{', ...' if len(names) > 2 else ''}). "
        if names
        else ""
    )
