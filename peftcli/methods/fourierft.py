"""FourierFT: a few coefficients of the change's discrete Fourier transform.

"Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", Gao et al., ICML 2024, arXiv
2405.03003.

    y = W x + b + dW x        dW = s Re(ifft2(F))
    F (O, I) zero but for c (n,) at random positions, the same in all layers of one shape

A smooth basis says much with few numbers. c starts normal, so the model does not start as the base:
entries of dW have deviation s sqrt(n/2) / (O I); `init_weights=true` starts at zero.

Positions and orientation are those of Hugging Face peft; the authors' code takes square layers only
and applies the transposed change, so its files do not carry over. A layer of fewer than n entries
trains all of them, where peft refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from annotated_types import Ge, Gt
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peftcli.core.site import Site
from peftcli.kernels.fourier_linear import fourier_linear, fourier_weight
from peftcli.methods.spectral import SpectralDelta, SpectralMethod, random_positions

if TYPE_CHECKING:
    from peftcli.core.host import Host


class FourierFTDelta(SpectralDelta):
    """dW = s Re(ifft2(F))   (Gao et al. 2024, eq. 3)."""

    hf_keys: ClassVar[dict[str, str]] = {"coefficients": "fourierft_spectrum"}

    def __init__(self, site: Site, positions: Tensor, scale: float) -> None:
        super().__init__(site, positions)
        self.scale = scale

    def delta(self, W: Tensor) -> Tensor:
        """s Re(ifft2(F))."""
        return fourier_weight(self.coefficients, self.positions, self.shape, self.scale)

    def product(self, x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        """(W + dW) x + b."""
        return fourier_linear(x, W, b, self.coefficients, self.positions, self.shape, self.scale)


@dataclass(frozen=True)
class FourierFT(SpectralMethod):
    """Sparse spectrum of the weight's change."""

    family: ClassVar[str] = "sparse"
    size_option: ClassVar[str | None] = "n"
    patterns: ClassVar[tuple[str, ...]] = ("n_pattern",)
    peft_type: ClassVar[str | None] = "FOURIERFT"
    hf_fields: ClassVar[Mapping[str, str]] = {
        "n": "n_frequency",
        "scaling": "scaling",
        "seed": "random_loc_seed",
        "init_weights": "init_weights",
    }
    hf_harmless: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "n_frequency_pattern"})

    n: Annotated[int, Ge(1)] = 1000
    scaling: Annotated[float, Gt(0)] = 150.0
    seed: Annotated[int, Ge(0)] = 777
    init_weights: bool = False
    n_pattern: dict[str, Annotated[int, Ge(1)]] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] = ("q", "v")

    @property
    def starts_at_base(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """With zeros, as peft calls its started weights."""
        return self.init_weights

    def build(self, site: Site) -> FourierFTDelta:
        """Coefficients at the seed's positions, normal or zero."""
        size = site.d_out * site.d_in
        n = min(int(site.pick(self.n_pattern, self.n)), size)
        delta = FourierFTDelta(site, random_positions(size, n, self.seed), self.scaling)
        if not self.init_weights:
            nn.init.normal_(delta.coefficients)
        return delta

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """Its layers are whole linears."""
        odd = [
            s.name
            for s in host.sites[name]
            if s.rows or not isinstance(s.module, nn.Linear | Conv1D)
        ]
        return f"peft transforms whole linear layers only, not {odd[0]}" if odd else None

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """The number of coefficients where it is not n."""
        counts = {s.path: d.coefficients.numel() for s, d in host.deltas(name)}  # pyright: ignore
        return {
            "n_frequency_pattern": {path: n for path, n in counts.items() if n != self.n},
            "bias": "none",
            "fan_in_fan_out": all(isinstance(s.module, Conv1D) for s in host.sites[name]),
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Numbers of coefficients of single modules."""
        return {"n_pattern": dict(config.get("n_frequency_pattern") or {})}
