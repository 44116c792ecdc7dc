"""LoHa: the Hadamard product of two low-rank products. FedPara: Low-rank Hadamard Product for
Communication-Efficient Federated Learning. Hyeon-Woo et al., ICLR 2022, arXiv 2108.06098; as an
adapter in LyCORIS, Yeh et al., ICLR 2024, arXiv 2309.14859.

    W' = W + s (W1a W1b) * (W2a W2b)      Wia (O, R), Wib (R, I), * elementwise, s = alpha / r

The elementwise product of two matrices of rank r has rank up to r^2, for twice LoRA's parameters.
`use_effective_conv2d` writes each factor of a convolution as a core T (R, R, K) between a (R, O)
and b (R, C), so that the K kernel positions cost R^2 instead of R each. Dropout and scale are those
of `lycoris.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from peftcli.core.delta import Delta
from peftcli.core.layer import Layer
from peftcli.core.site import Site
from peftcli.kernels.loha_linear import Pairs, hadamard_product, loha_linear
from peftcli.methods.low_rank import kaiming
from peftcli.methods.lycoris import Lycoris, LycorisDelta, from_core, hf_core, kernel_of


class LoHaDelta(LycorisDelta):
    """dW = s (W1a W1b) * (W2a W2b)  (Hyeon-Woo et al. 2022); with cores, each factor of a
    convolution is sum_pq T[p, q, k] a[p, o] b[q, c]  (prop. 3).
    """

    hf_keys: ClassVar[dict[str, str]] = {
        "W1a": "hada_w1_a",
        "W1b": "hada_w1_b",
        "W2a": "hada_w2_a",
        "W2b": "hada_w2_b",
    }

    def __init__(self, method: LoHa, site: Site) -> None:
        super().__init__(method, site, rescales=True)
        r, kernel = method.rank(site), kernel_of(site)
        core = method.use_effective_conv2d and kernel > 1
        a, b = (
            ((r, site.d_out), (r, site.d_in // kernel))
            if core
            else ((site.d_out, r), (r, site.d_in))
        )
        self.W1a, self.W1b, self.W2a = kaiming(*a), kaiming(*b), kaiming(*a)  # (O, R), (R, I)
        self.W2b = nn.Parameter(torch.zeros(b))  # (R, I), zero so dW = 0 at start
        self.T1 = kaiming(r, r, kernel) if core else None  # (R, R, K)
        self.T2 = kaiming(r, r, kernel) if core else None

    def delta(self, W: Tensor) -> Tensor:
        """s (W1a W1b) * (W2a W2b)."""
        if self.T1 is None or self.T2 is None:
            return self.scale * hadamard_product(self.W1a, self.W1b, self.W2a, self.W2b)
        P1, P2 = from_core(self.T1, self.W1a, self.W1b), from_core(self.T2, self.W2a, self.W2b)
        return self.scale * (P1 * P2).flatten(1)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """(W + dW) x + b, in one operation for a plain linear layer."""
        if self.drops or not layer.is_plain:
            return super().forward(x, layer)
        pairs = Pairs(self.W1a, self.W1b, self.W2a, self.W2b)
        return loha_linear(x, layer.weight, layer.bias, pairs, self.scale)


@dataclass(frozen=True)
class LoHa(Lycoris):
    """Low-rank Hadamard products on linear, convolution and embedding weights."""

    peft_type: ClassVar[str | None] = "LOHA"

    def build(self, site: Site) -> LoHaDelta:
        """Two pairs of factors for the site."""
        return LoHaDelta(self, site)

    def hf_module(self, module: nn.Module, delta: Delta) -> dict[str, Tensor]:
        """The factors, and the cores of a convolution."""
        assert isinstance(delta, LoHaDelta)
        cores = {"hada_t1": delta.T1, "hada_t2": delta.T2}
        held = {key: hf_core(module, T) for key, T in cores.items() if T is not None}
        return super().hf_module(module, delta) | held
