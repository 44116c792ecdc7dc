"""The equations y = tuner(x; layer): what peft built, as a Delta that is grafted like any other.

A wrapper of peft holds its module. Here it holds a twin of the module instead, so that the base
stays where it was, under its own names.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.delta import Delta, NotMergeable
from peftcli.core.layer import Bare, Layer
from peftcli.errors import ConfigError


class PeftDelta(Delta):
    """y = tuner(x; layer): one of peft's wrappers on the module that it was made for."""

    def __init__(self, wrapper: nn.Module, slot: str, module: nn.Module) -> None:
        super().__init__()
        self.wrapper, self.slot = wrapper, slot
        # in __dict__ alone: the base is no part of the delta
        self.__dict__["twin"] = wrapper.__dict__[slot] = _twin(module)

    def train(self, mode: bool = True) -> PeftDelta:
        """The twin's dropout follows too."""
        self.__dict__["twin"].training = mode
        return super().train(mode)

    def forward(self, x: Any, layer: Layer) -> Any:
        """The wrapper's output; what else the module was called with goes along."""
        if not isinstance(layer, Bare):
            raise ConfigError("an adapter of method=hf_peft must be the first that is switched on.")
        if layer.key is None:
            return self.wrapper(x, *layer.args, **layer.kwargs)
        return self.wrapper(*layer.args, **{**layer.kwargs, layer.key: x})

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The wrapper's values at the unit vectors: an affine map is known by them. A wrapper that
        is not affine does not fold.
        """
        twin: nn.Module = self.__dict__["twin"]
        if isinstance(twin, nn.Embedding):
            return self.wrapper(torch.arange(W.shape[1], device=W.device)).T, b
        if not weights.has_weight_matrix(twin) or weights.kind_of(twin) != "linear":
            raise NotMergeable(f"peft's wrapper of a {type(twin).__name__} does not fold here")
        unit = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
        origin = self.wrapper(torch.zeros_like(unit[:1]))  # (1, O)
        W = (self.wrapper(unit) - origin).T
        x = torch.linspace(-1, 1, W.shape[1], dtype=W.dtype, device=W.device)[None]
        if not torch.allclose(self.wrapper(x), x @ W.T + origin, atol=1e-3, rtol=1e-3):
            raise NotMergeable(f"{type(self.wrapper).__name__} of peft is not linear in its input")
        return W, origin[0] if b is not None or origin.any() else None


class PromptDelta(PeftDelta):
    """y = model([prompt; x]): a PeftModel of one of the prompt tuners, on the whole model. `P`
    tokens or keys lie before every row; only the row's own logits are given back.
    """

    def __init__(self, wrapper: nn.Module, module: nn.Module, P: int, in_cache: bool) -> None:
        super().__init__(wrapper, "base_model", module)
        self.P, self.in_cache = P, in_cache

    def forward(self, x: Any, layer: Layer) -> Any:
        """The model's output for the batch `x`; once the prompt is in the cache, it stays there."""
        past, keep = x.get("past_key_values"), x.get("logits_to_keep")
        # positions are counted from the prompt on, as peft does
        x = {k: v for k, v in x.items() if k not in ("position_ids", "cache_position")}
        if past is not None and past.get_seq_length():
            mask = x.get("attention_mask")
            if mask is not None:
                x["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.P), mask], 1)
            return layer(x)
        if self.in_cache:
            x.pop("past_key_values", None)
        elif isinstance(keep, Tensor):
            x["logits_to_keep"] = keep + self.P
        y = self.wrapper(**x)
        rows = x["input_ids"].shape[1]
        if not self.in_cache and y.logits.ndim == 3 and y.logits.shape[1] == self.P + rows:
            y.logits = y.logits[:, self.P :]
        return y

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Tokens fold into no weight."""
        raise NotMergeable("a prompt does not fold into a weight")


def _twin(module: nn.Module) -> nn.Module:
    """The module once more: the same parameters, buffers and parts, without hooks and deltas."""
    twin = type(module).__new__(type(module))
    nn.Module.__init__(twin)
    fresh = {k for k in vars(twin) if k not in ("_parameters", "_buffers", "training")}
    twin.__dict__.update({k: v for k, v in vars(module).items() if k not in fresh})
    twin.__dict__["_modules"] = dict(module._modules)
    return twin
