"""How a base's linears are stored: quantised on the way by bitsandbytes (4 or 8 bits) through
transformers, or already in the model's files.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from peftcli.errors import ConfigError
from peftcli.imports import optional
from peftcli.models import packed
from peftcli.models.quiet import quiet
from peftcli.models.roles import layout
from peftcli.settings import Quantization

BITSANDBYTES = ("nf4", "fp4", "int8")
READ = (*BITSANDBYTES, *packed.LAYOUTS)  # what a checkpoint itself may hold


def stored_as(config: PreTrainedConfig) -> str | None:
    """How a checkpoint itself holds its linears: nf4, fp4, int8, or the word of its config.json for
    another way (gptq, awq); None where they are plain.
    """
    told = told_in(config)
    if told is None:
        return None
    if told.get("load_in_8bit"):
        return "int8"
    if told.get("load_in_4bit"):
        return told.get("bnb_4bit_quant_type", "fp4")
    return str(told.get("quant_method"))


def told_in(config: PreTrainedConfig) -> dict[str, Any] | None:
    """What a checkpoint's config.json says of how it is quantised; None where it is not."""
    found: Any = getattr(config, "quantization_config", None)
    return found if found is None or isinstance(found, dict) else found.to_dict()


def refuse_stored(model: str, config: PreTrainedConfig, asked: str) -> None:
    """Raises `ConfigError` where a quantised checkpoint cannot be read, or not as it is asked
    for.
    """
    stored, told = stored_as(config), told_in(config)
    if stored is None or told is None:
        return
    plain = "or name the model that it was made from, with quantization=nf4"
    if stored not in READ:
        raise ConfigError(
            f"model.name_or_path={model}: is stored in {stored}, which is not read here. Take one "
            f"in {', '.join(READ)}, {plain}."
        )
    if asked != "none":
        raise ConfigError(
            f"quantization={asked}: {model} is stored in {stored} already. Use quantization=none, "
            f"which leaves it so, {plain}."
        )
    if stored in packed.LAYOUTS:
        packed.packing_of(model, told)
    else:
        refuse_missing(f"model.name_or_path={model}: is stored in {stored}, which")


def refuse_missing(what: str) -> None:
    """Raises `ConfigError` where bitsandbytes, which `what` needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{what} needs bitsandbytes: pip install 'peftcli[bitsandbytes]'")


def compute_in(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Have products with weights that the checkpoint holds in 4 bits run in `dtype`, instead of in
    its publisher's.
    """
    found: Any = getattr(config, "quantization_config", None)
    if isinstance(found, dict) and found.get("load_in_4bit"):
        found["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")


def loading(
    quantization: Quantization, empty: PreTrainedModel, compute_dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of `from_pretrained`, for the model that `empty` is without weights; none without
    quantisation. What lies outside of the blocks - embeddings, heads, which may be new - stays.

    Raises `ConfigError` where bitsandbytes is missing, or `skip_modules` matches nothing.
    """
    if quantization.name == "none":
        return {}
    refuse_missing(f"quantization={quantization.name}")
    from transformers import BitsAndBytesConfig

    optional("bitsandbytes")

    config = BitsAndBytesConfig(
        load_in_8bit=quantization.name == "int8",
        load_in_4bit=quantization.name != "int8",
        llm_int8_threshold=quantization.threshold,
        llm_int8_skip_modules=_skipped(quantization, empty),
        bnb_4bit_quant_type="nf4" if quantization.name == "int8" else quantization.name,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
    )
    return {"quantization_config": config}


def keep_stored(model: nn.Module) -> None:
    """Have bitsandbytes leave weights in 4 bits as they are. On a CPU with AVX512-BF16 its layers
    would otherwise pack them anew at the first product outside of training, with rounded scales,
    for a kernel without a gradient.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # for the type checker


def dequantise(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with plain linears that hold what their bits mean, in `dtype`."""
    with quiet():
        plain: Any = cast(Any, model).dequantize().to(dtype)
    if hasattr(plain.config, "quantization_config"):
        del plain.config.quantization_config
    if hasattr(plain, "_weight_conversions"):  # how the files were read; saving goes it backwards
        plain._weight_conversions = [c for c in plain._weight_conversions or [] if _reverses(c)]
    return plain


def _reverses(conversion: Any) -> bool:
    """Whether the way from a file's tensors to the model's can be gone back; that out of few bits
    cannot.
    """
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True


def requantised(folder: Path, quantization: Quantization) -> PreTrainedModel:
    """A plain saved model read back in 4 or 8 bits."""
    config: Any = AutoConfig.from_pretrained(folder)
    cls = getattr(transformers, config.architectures[0])
    with torch.device("meta"), quiet():
        empty = cls(config)
    stored = loading(quantization, empty, torch.float32)
    with quiet():
        model = cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **stored)
    keep_stored(model)
    return model


def _skipped(quantization: Quantization, empty: PreTrainedModel) -> list[str]:
    """Paths of the linears that stay as they are."""
    where = layout(empty)
    linears = [path for path, module in empty.named_modules() if isinstance(module, nn.Linear)]
    for given in quantization.skip_modules:
        if not any(_within(path, given) for path in linears):
            raise ConfigError(
                f"quantization.skip_modules: no linear of {type(empty).__name__} is or lies in "
                f"{given!r}."
            )
    return [
        path
        for path in linears
        if where.block_of(path) is None or any(_within(path, g) for g in quantization.skip_modules)
    ]


def _within(path: str, name: str) -> bool:
    """Whether the path is, or lies in, a module with this path or last names."""
    return f".{name}." in f".{path}."
