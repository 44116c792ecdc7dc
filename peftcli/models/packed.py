"""Checkpoints that GPTQ or AWQ quantised, read from their published layouts without a library.

Which linears are packed is what the files say, whatever the configuration lists: those with a
`qweight`. Everything else is loaded as of any other model.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from peftcli.core.packed import WORD, PackedLinear, Packing
from peftcli.errors import ConfigError, DataError
from peftcli.models.files import weight_files

BITS = {"gptq": (2, 3, 4, 8), "awq": (4,)}
LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
QUANTISER = "packed"  # as transformers knows ours


def packing_of(model: str, told: Mapping[str, Any]) -> Packing:
    """How the linears of `model` lie in its files, by the `quantization_config` of its config.json.
    Raises `ConfigError` for what is not read here.
    """
    method = str(told["quant_method"])
    layout_key, layout = _layout(method, told)
    overrides = [p for p in told.get("dynamic") or {} if not p.startswith("-:")]
    for key, found, read in (
        (layout_key, layout, LAYOUTS[method]),
        ("bits", told.get("bits"), BITS[method]),
        ("pack_dtype", str(told.get("pack_dtype") or "int32"), ("int32",)),
        ("dynamic", ", ".join(overrides), ("",)),  # modules with bits of their own
    ):
        if found not in read:
            known = " or ".join(map(str, filter(None, read))) or "no such entry"
            raise ConfigError(
                f"model.name_or_path={model}: is stored in {method} with {key}={found}, which is "
                f"not read here; {known} is. Take another checkpoint, or name the model that it "
                "was made from, with quantization=nf4."
            )
    size = told.get("group_size", 128)
    if not isinstance(size, int) or (size < 1 and size != -1):
        raise ConfigError(f"model.name_or_path={model}: {method} with group_size={size}.")
    order = AWQ_ORDER if method == "awq" else ()
    return Packing(told["bits"], size, order, zeros_less_one=layout == "gptq")


def _layout(method: str, told: Mapping[str, Any]) -> tuple[str, str]:
    """(key, value) of what says in which layout the words are."""
    if told.get("backend") == "llm-awq":
        return "backend", "llm-awq"
    keys = ("version", "format") if method == "awq" else ("checkpoint_format", "format")
    key = next((k for k in keys if told.get(k)), keys[0])
    return key, str(told.get(key) or LAYOUTS[method][0]).lower()


@dataclass(frozen=True)
class Stored:
    """What the files hold of one packed linear: empty tensors by name, on the meta device."""

    tensors: dict[str, Tensor]
    spare_bias: bool  # the architecture has none there; some packers write zeros


class PackedConfig(QuantizationConfigMixin):
    """What transformers hands on to `PackedQuantiser`; saved as config.json had it."""

    def __init__(
        self,
        told: Mapping[str, Any],
        packing: Packing,
        layers: Mapping[str, Stored],
        dtype: torch.dtype,
    ) -> None:
        self.quant_method: Any = QUANTISER
        self.told, self.packing, self.layers, self.dtype = dict(told), packing, layers, dtype

    def to_dict(self) -> dict[str, Any]:
        """As config.json had it."""
        return copy.deepcopy(self.told)


def loading(
    told: Mapping[str, Any], folder: Path, empty: PreTrainedModel, dtype: torch.dtype
) -> dict[str, Any]:
    """Arguments of `from_pretrained`, for the model in `folder` that `empty` is without weights;
    its configuration must not say that it is quantised. Dequantised weights are of `dtype`.

    Raises `DataError` where what the files hold does not fit the model.
    """
    packing, files = packing_of(str(folder), told), _headers(folder, dtype)
    layers = {}
    for path, module in empty.named_modules():
        name = next((n for n in _names(empty, path) if f"{n}.qweight" in files), None)
        if name and isinstance(module, nn.Linear | Conv1D):
            stored = {k: files[f"{name}.{k}"] for k in _KEYS if f"{name}.{k}" in files}
            _refuse_misfits(f"{folder}: {name}", packing, module, stored)
            layers[path] = Stored(stored, "bias" in stored and module.bias is None)
    if not layers:
        raise DataError(
            f"{folder}/config.json says {told['quant_method']}, but no linear of "
            f"{type(empty).__name__} is packed (.qweight) in its safetensors."
        )
    return {"quantization_config": PackedConfig(told, packing, layers, dtype)}


_KEYS = ("qweight", "qzeros", "scales", "g_idx", "bias")


def _names(model: PreTrainedModel, path: str) -> tuple[str, str]:
    """What the module may be called in the files."""
    return path, path.removeprefix(f"{model.base_model_prefix}.")


def _headers(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the files by name, empty; biases in `dtype`, all others in their own."""
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                own = file.get_slice(name)
                kind = dtype if name.endswith(".bias") else _TYPES.get(own.get_dtype(), dtype)
                found[name] = torch.empty(own.get_shape(), dtype=kind, device="meta")
    return found


_TYPES = {
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


def _refuse_misfits(
    where: str, packing: Packing, module: nn.Module, stored: Mapping[str, Tensor]
) -> None:
    """Raises `DataError` where what is stored is no packed linear of the module's size."""
    d_out, d_in = _size(module)
    needs_whole_words = {"outputs": d_out} if packing.order else {"outputs": d_out, "inputs": d_in}
    for name, n in needs_whole_words.items():
        if n * packing.bits % WORD:
            raise DataError(f"{where}: {n} {name} of {packing.bits} bits fill no whole words.")
    for key, shape in packing.shapes(d_out, d_in).items():
        found = tuple(stored[key].shape) if key in stored else None
        if found != shape and (found or key != "g_idx"):
            raise DataError(
                f"{where}.{key} is {found or 'missing'}; a linear of {d_in} inputs and {d_out} "
                f"outputs in {packing.bits} bits and groups of {packing.group_size} has {shape}. "
                "Does config.json say how these files were made?"
            )


def _size(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a plain linear."""
    shape = tuple(module.get_parameter("weight").shape)
    return (shape[1], shape[0]) if isinstance(module, Conv1D) else (shape[0], shape[1])


@register_quantizer(QUANTISER)
class PackedQuantiser(HfQuantizer):
    """Puts `PackedLinear`s where the files have packed weights."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        told = self.quantization_config
        for path, stored in told.layers.items():
            module = model.get_submodule(path)
            d_out, d_in = _size(module)
            tensors = dict(stored.tensors)
            if module.bias is not None and "bias" not in tensors:
                tensors["bias"] = module.bias.data  # missing: `load_model` says so
            new = PackedLinear(told.packing, d_in, d_out, tensors, told.dtype, type(module))
            model.set_submodule(path, new)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for path, stored in self.quantization_config.layers.items():
            module: PackedLinear = model.get_submodule(path)
            try:
                module.settle()
            except DataError as e:
                raise DataError(f"{model.name_or_path}: {path}.{e}.") from None
            if stored.spare_bias and module.bias is not None and not module.bias.any():
                module.register_parameter("bias", None)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for path in self.quantization_config.layers:
            packed: PackedLinear = model.get_submodule(path)
            model.set_submodule(path, packed.plain(dtype or packed.dtype))
        return model

    def is_serializable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What is kept in memory is not what the files have."""
        return False

    @property
    def is_trainable(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adapters on it are."""
        return True
