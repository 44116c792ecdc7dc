"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko, Blankevoort, Asano, ICLR 2024, arXiv
2310.11454.

    y = W x + bias + b * (B (d * (A x)))        A (R, I), B (O, R) random, shared and frozen
                                                b (O,), d (R,) trained, * elementwise

One random pair of projections serves every layer; what a layer needs is only how much of each of
their directions to use. A layer takes the first I columns of A and the first O rows of B, which are
as large as the largest layer. There is no alpha: the scale is in d.

The pair is drawn on the CPU from `prng_key`, as in Hugging Face peft, so that the key alone stands
for it; the largest layer decides what is drawn. `save_projection` keeps it in files all the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.delta import WeightDelta
from peftcli.core.layer import Layer
from peftcli.core.method import Method
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.kernels.lora_linear import lora_linear

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class Projections(nn.Module):
    """The frozen pair A (R, I), B (O, R) of all layers."""

    def __init__(self, r: int, d_in: int, d_out: int, key: int, saved: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(key)
        self.register_buffer("A", _uniform(r, d_in, generator), persistent=saved)  # (R, I)
        self.register_buffer("B", _uniform(d_out, r, generator), persistent=saved)  # (O, R)


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Kaiming's uniform start for a rectifier: variance 2 / columns."""
    bound = math.sqrt(6 / columns)
    return torch.empty(rows, columns, device="cpu").uniform_(-bound, bound, generator=generator)


class VeRADelta(WeightDelta):
    """dW = diag(b) B diag(d) A  (Kopiczko et al. 2024, eq. 2)."""

    hf_keys: ClassVar[dict[str, str]] = {"b": "vera_lambda_b", "d": "vera_lambda_d"}

    def __init__(self, site: Site, shared: Projections, d_initial: float, dropout: float) -> None:
        super().__init__()
        self.dropout, self.shared = dropout, (shared,)
        self.d_out, self.d_in = site.d_out, site.d_in
        r = shared.get_buffer("A").shape[0]
        self.d = nn.Parameter(torch.full((r,), d_initial))  # (R,)
        self.b = nn.Parameter(torch.zeros(site.d_out))  # (O,), zero so dW = 0 at start

    def projections(self) -> tuple[Tensor, Tensor]:
        """A (R, I) and B (O, R), as much of them as the layer needs."""
        (shared,) = self.shared
        return shared.get_buffer("A")[:, : self.d_in], shared.get_buffer("B")[: self.d_out]

    def delta(self, W: Tensor) -> Tensor:
        """diag(b) B diag(d) A."""
        A, B = self.projections()
        return self.b[:, None] * (B * self.d) @ A

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """W x + bias + b * (B (d * (A drop(x)))); the backward pass needs A x and not x."""
        A, B = self.projections()
        if layer.is_plain:
            p = self.dropout if self.training else 0.0
            changed = self.b[:, None] * (B * self.d)  # (O, R)
            return lora_linear(x, layer.weight, layer.bias, A, changed, 1.0, p)
        y = layer(x)
        x = F.dropout(x, self.dropout, self.training).to(y.dtype)
        u = layer.linear(x, A.to(y.dtype))
        z = layer.mix(self.d.to(y.dtype) * u, B.to(y.dtype))
        return y + self.b.to(y.dtype) * z


@dataclass(frozen=True)
class VeRA(Method):
    """Two trained vectors a layer around a shared random pair, on linear layers."""

    family: ClassVar[str] = "low-rank"
    size_option: ClassVar[str | None] = "r"
    peft_type: ClassVar[str | None] = "VERA"
    hf_fields: ClassVar[Mapping[str, str]] = {
        "r": "r",
        "dropout": "vera_dropout",
        "d_initial": "d_initial",
        "prng_key": "projection_prng_key",
        "save_projection": "save_projection",
    }
    hf_harmless: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "init_weights"})

    r: Annotated[int, Ge(1)] = 256
    d_initial: float = 0.1
    prng_key: Annotated[int, Ge(0)] = 0
    save_projection: bool = True
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | tuple[str, ...] = ("q", "v")

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Draw the pair for the largest sides, then graft."""
        sites = host.find(self.target_modules)
        if odd := next((site for site in sites if site.kind != "linear"), None):
            raise ConfigError(
                f"method=vera adapts linear layers; {odd.path} is of kind {odd.kind}. Change "
                "method.target_modules."
            )
        d_in, d_out = max(s.d_in for s in sites), max(s.d_out for s in sites)
        pair = Projections(self.r, d_in, d_out, self.prng_key, self.save_projection)
        shared = host.share(pair.to(sites[0].device))
        assert isinstance(shared, Projections)
        for site in sites:
            host.graft(site, VeRADelta(site, shared, self.d_initial, self.dropout))

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """peft takes whole modules."""
        part = next((site for site in host.sites[name] if site.rows), None)
        return part and f"peft has no such delta on a part of a fused linear ({part.name})"

    def hf_tensors(self, host: Host, name: str) -> dict[str, Tensor]:
        """The vectors, and the pair where it is saved."""
        pair = dict(host.shared(name).named_buffers()) if self.save_projection else {}
        held = {f"base_model.vera_{letter}": tensor for letter, tensor in pair.items()}
        return super().hf_tensors(host, name) | held

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """What peft wants to know of the modules."""
        modules = [site.module for site in host.sites[name]]
        return {"fan_in_fan_out": all(isinstance(m, Conv1D) for m in modules), "bias": "none"}
