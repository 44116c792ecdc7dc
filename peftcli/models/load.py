"""The model of a source, ready for a task.

Weights go from the mapped safetensors straight into the wanted type. What a task adds to the model
(a classifier) is drawn from torch's random stream and reported, so that it is trained and saved.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peftcli.errors import ConfigError, DataError, UserError, did_you_mean, first_sentence
from peftcli.imports import optional
from peftcli.models import packed
from peftcli.models.convert import folder_of
from peftcli.models.inputs import load_tokenizer
from peftcli.models.quantise import (
    BITSANDBYTES,
    compute_in,
    dequantise,
    keep_stored,
    loading,
    stored_as,
    told_in,
)
from peftcli.models.quiet import quiet
from peftcli.models.roles import Layout, layout
from peftcli.models.source import Source
from peftcli.models.tasks import class_for, for_task
from peftcli.settings import Model, Quantization, Task

# Buffers that older versions of transformers saved and newer ones compute.
_NO_WEIGHTS = re.compile(r"position_ids$|inv_freq$|masked_bias$|attn(ention)?\.bias$")


@dataclass(frozen=True)
class Loaded:
    """A model and the paths of its modules that no file held: their weights are freshly drawn."""

    model: PreTrainedModel
    new_modules: tuple[str, ...]


def load_config(source: Source, cfg: Model) -> PreTrainedConfig:
    """The model's configuration. Raises DataError for an architecture that transformers lacks."""
    folder = folder_of(source)
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
    except (ValueError, KeyError) as error:
        raise DataError(f"{folder}/config.json: {first_sentence(error)}") from None


def load_model(
    source: Source,
    cfg: Model,
    task: Task,
    *,
    dtype: torch.dtype,
    labels: tuple[str, ...] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization: Quantization | None = None,
    compute_dtype: torch.dtype = torch.float32,
    dequantised: bool = False,
    cloze: bool = False,
) -> Loaded:
    """The model of the source for the task, its weights in `dtype`, in evaluation mode.

    Args:
        labels: names of the classes, in the order of their ids; None keeps those of the files.
        tokenizer: the model pads with its padding token; loaded where it is not given.
        quantization: how the linears of the blocks are stored, where the files hold them plain.
        compute_dtype: of products with weights in 4 bits.
        dequantised: quantised weights as they are rounded, but stored in `dtype`.
        cloze: a masked-language head in place of a fresh classifier.

    Raises:
        ConfigError: the architecture has no model for the task, or lacks the attention asked for.
        DataError: weights are missing, or there are some that config.json knows nothing of.
    """
    config: Any = for_task(load_config(source, cfg), task, labels)
    cls = class_for(task, config, cfg, cloze)
    compute_in(config, compute_dtype)
    stored, in_files = {}, stored_as(config)
    if in_files in BITSANDBYTES:
        optional("bitsandbytes")
    if quantization and quantization.name != "none":
        stored = loading(quantization, empty_model(config, task, labels, cloze), compute_dtype)
    elif in_files in packed.LAYOUTS and (told := told_in(config)):
        del config.quantization_config  # transformers would look for a library to read it
        empty = empty_model(config, task, labels, cloze)
        stored = packed.loading(told, folder_of(source), empty, dtype)
    model, info = _read(cls, source, cfg, config=config, dtype=dtype, **stored)
    keep_stored(model)
    if dequantised and (stored or in_files):
        model = dequantise(model, dtype)
    new_modules = _new_modules(model, info, task, source)
    if cloze and new_modules:
        raise ConfigError(
            f"{source.name} has no masked-language head ({new_modules[0]} is missing), which "
            "method.label_words need. Take the pretrained encoder, or leave them out."
        )
    if task != "image_classification":
        _pad_alike(model, tokenizer or load_tokenizer(source, cfg))
    return Loaded(model.eval(), new_modules)


def _read(cls: Any, source: Source, cfg: Model, **options: Any) -> tuple[PreTrainedModel, Any]:
    """The model of the source's files, and what transformers says of how they fit it."""
    attention = cfg.attn_implementation
    try:
        with quiet():
            return cls.from_pretrained(
                folder_of(source),
                attn_implementation=None if attention == "auto" else attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=cfg.trust_remote_code,
                ignore_mismatched_sizes=True,  # judged by the caller
                output_loading_info=True,
                **options,
            )
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        reason = first_sentence(error)
        if attention == "auto":
            raise DataError(f"{source.name} cannot be loaded: {reason}") from None
        raise ConfigError(f"model.attn_implementation={attention}: {reason} Or use auto.") from None


def empty_model(
    source: Source | PreTrainedConfig,
    task: Task,
    labels: tuple[str, ...] | None = None,
    cloze: bool = False,
) -> PreTrainedModel:
    """The model without weights, on the meta device: for counting parameters and sites."""
    if isinstance(source, Source):
        source = load_config(source, Model(source.name))
    config = for_task(source, task, labels)
    with torch.device("meta"), quiet():
        return class_for(task, config, cloze=cloze)(config).eval()


def head_of(model: PreTrainedModel) -> tuple[str, ...]:
    """Paths of the modules outside of the pretrained body: those that a classifier begins with."""
    body = f"{model.base_model_prefix}."
    new = {key for key in model.state_dict() if not key.startswith(body)}
    return tuple(
        dict.fromkeys(_highest(key, model, new) for key in model.state_dict() if key in new)
    )


def config_of(architecture: Mapping[str, Any]) -> PreTrainedConfig:
    """A configuration from its model type and dimensions (`model.architecture`).

    Raises ConfigError for a type or a name that transformers does not have.
    """
    dimensions = dict(architecture)
    kind = dimensions.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        near = did_you_mean(str(kind), CONFIG_MAPPING)
        raise ConfigError(
            f"model.architecture.model_type={kind}: transformers has no such architecture.{near}"
        )
    cls = CONFIG_MAPPING[kind]
    known = {*cls().to_dict(), *cls.attribute_map}
    modeling = importlib.import_module(cls.__module__.replace("configuration_", "modeling_"))
    code = inspect.getsource(modeling)  # DeBERTa reads some that its configuration does not list
    for name in dimensions:
        if name not in known and f'(config, "{name}"' not in code:
            raise ConfigError(
                f"model.architecture.{name}: a {kind} has no such dimension."
                f"{did_you_mean(name, known)}"
            )
    try:
        return cls(**dimensions)
    except (TypeError, ValueError) as error:  # of a wrong type, or dimensions that do not fit
        raise ConfigError(f"model.architecture: {first_sentence(error)}") from None


def _pad_alike(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model pads with the tokenizer's token: a decoder's classifier looks for it."""
    model.config.pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _new_modules(model: nn.Module, info: Any, task: Task, source: Source) -> tuple[str, ...]:
    """Paths of freshly drawn modules, as far up as all is new; DataError for misfits."""
    where = layout(model)
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    has_head = task not in ("causal_lm", "seq2seq")
    heads = {key for key in new if has_head and _is_head(key, model, where)}
    stray = [key for key in info["unexpected_keys"] if _is_in_stack(key, model, where)]
    _refuse(new - heads, f"{source.name}: missing, or of another shape than config.json says")
    _refuse(stray, f"{source.name}: weights that config.json knows nothing of")
    found = dict.fromkeys(_highest(key, model, new) for key in model.state_dict() if key in new)
    return tuple(found)


def _is_head(key: str, model: nn.Module, where: Layout) -> bool:
    """Whether a weight lies outside of the pretrained body, or in its pooler."""
    path = key.rpartition(".")[0]
    if where.block_of(path) is not None or where.role_of(path) in ("embed", "position"):
        return False
    in_body = key.startswith(f"{getattr(model, 'base_model_prefix', '')}.")
    return where.role_of(path) == "pooler" or not in_body


def _is_in_stack(key: str, model: nn.Module, where: Layout) -> bool:
    """Whether a weight claims a place among the model's blocks; those of other heads do not."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    stacks = {block.rpartition(".")[0] for block in where.blocks}
    stacks |= {stack.removeprefix(prefix) for stack in stacks}
    inside = any(re.match(rf"{re.escape(stack)}\.\d+\.", key) for stack in stacks)
    return inside and not _NO_WEIGHTS.search(key)


def _refuse(keys: Iterable[str], what: str) -> None:
    keys = sorted(keys)
    if keys:
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        raise DataError(f"{what}: {', '.join(keys[:3])}{more}.")


def _highest(key: str, model: nn.Module, new: set[str]) -> str:
    """The outermost module around the weight of which every weight is new."""
    path = key.rpartition(".")[0]
    while parent := path.rpartition(".")[0]:
        weights = [f"{parent}.{name}" for name in model.get_submodule(parent).state_dict()]
        if not set(weights) <= new:
            break
        path = parent
    return path
