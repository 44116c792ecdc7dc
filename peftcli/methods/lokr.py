"""LoKr: low-rank Kronecker products. Navigating Text-To-Image Customization: From LyCORIS
Fine-Tuning to Model Evaluation. Yeh et al., ICLR 2024, arXiv 2309.14859; after KronA, Edalati et
al. 2022, arXiv 2212.10650.

    W' = W + s W1 (x) W2        W1 (a, c), W2 (b, e), a b = O, c e = I, s = alpha / r

A Kronecker product has the rank of W1 times that of W2, so two small matrices reach a high rank. W2
is a product W2a (b, R) W2b (R, e) where r < max(b, e) / 2, and with `decompose_both` W1 likewise.
The scale is alpha / r even where both are whole.

The Kronecker product is never formed in the forward pass: with x as a (c, e) matrix, the change
of the output is the (a, b) matrix W1 x W2'. The kernel of a convolution belongs to W2; there W2 is
itself a convolution on e channels. Only a convolution with groups, whose borders need not be those
of the factors, takes the dense way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge
from torch import Tensor, nn

from peftcli.core.delta import Delta
from peftcli.core.layer import Layer
from peftcli.core.site import Site
from peftcli.kernels.kron_linear import Kron, kron_linear
from peftcli.methods.low_rank import kaiming
from peftcli.methods.lycoris import Lycoris, LycorisDelta, from_core, hf_core, kernel_of


def factors(d: int, bound: int = -1) -> tuple[int, int]:
    """d = m n: m = `bound` where that divides d, else the pair nearest to a square with m <= n and
    m <= `bound` (-1: no bound).
    """
    if bound > 0 and d % bound == 0:
        return bound, d // bound
    top = math.isqrt(d) if bound < 0 else min(math.isqrt(d), bound)
    m = max((m for m in range(1, top + 1) if d % m == 0), default=1)
    return m, d // m


class LoKrDelta(LycorisDelta):
    """dW = s W1 (x) W2, row i1 b + i2, column (j1 e + j2) K + k  (Yeh et al. 2024)."""

    def __init__(self, method: LoKr, site: Site) -> None:
        super().__init__(method, site, method.rank_dropout_scale)
        self.kind, self.groups = site.kind, site.groups
        r, self.kernel = method.rank(site), kernel_of(site)
        a, b = factors(site.d_out, method.decompose_factor)
        c, e = factors(site.d_in // self.kernel, method.decompose_factor)
        self.c, self.e = c, e
        if method.decompose_both and r < max(a, c) / 2:
            self.W1a, self.W1b = kaiming(a, r), kaiming(r, c)  # (a, R), (R, c)
        else:
            self.W1 = kaiming(a, c)  # (a, c)
        if not r < max(b, e) / 2:
            self.W2 = kaiming(b, e * self.kernel)  # (b, e K)
        elif method.use_effective_conv2d and self.kernel > 1:
            self.T2 = kaiming(r, r, self.kernel)  # (R, R, K)
            self.W2a, self.W2b = kaiming(r, b), kaiming(r, e)  # (R, b), (R, e)
        else:
            self.W2a, self.W2b = kaiming(b, r), kaiming(r, e * self.kernel)  # (b, R), (R, e K)
        whole, part = ("W1", "W1a") if method.init == "default" else ("W2", "W2b")
        nn.init.zeros_(self.get_parameter(whole if hasattr(self, whole) else part))

    def outer(self) -> Tensor:
        """W1 (a, c)."""
        return self.W1 if hasattr(self, "W1") else self.W1a @ self.W1b

    def inner(self) -> tuple[Tensor | None, Tensor]:
        """W2 as (W2a (b, R), W2b (R, e K)), or as (None, W2 (b, e K))."""
        if hasattr(self, "W2"):
            return None, self.W2
        if hasattr(self, "T2"):
            return None, from_core(self.T2, self.W2a, self.W2b).flatten(1)
        return self.W2a, self.W2b

    def delta(self, W: Tensor) -> Tensor:
        """s W1 (x) W2, dense."""
        W2a, W2b = self.inner()
        W2 = W2b if W2a is None else W2a @ W2b
        blocks = torch.kron(self.outer()[..., None], W2.unflatten(1, (-1, self.kernel)))
        return self.scale * blocks.flatten(1)  # (O, C, K) -> (O, I)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """W x + b + s vec(W1 x W2'), x as a (c, e) matrix."""
        if self.groups > 1:
            return super().forward(x, layer)
        if layer.is_plain and not self.drops:
            k = Kron(self.outer(), *self.inner())
            return kron_linear(x, layer.weight, layer.bias, k, self.scale)
        y = layer(x)
        z = self.scale * self.product(x.to(y.dtype) if x.is_floating_point() else x, layer, y.dtype)
        if self.drops:
            z = z * self.rows_kept(z.shape[-1], z.device).to(y.dtype)
        return y + (z.movedim(-1, 1) if self.kind == "conv" else z)

    def product(self, x: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
        """(W1 (x) W2) x with the channels last. W2b acts first, then W1 across the c blocks, then
        W2a.
        """
        W1, (W2a, W2b) = self.outer().to(dtype), self.inner()
        if self.kind == "embedding":  # a one-hot row is a Kronecker product of two
            W1 = F.embedding(x // self.e, W1.T)[..., None]  # (..., a, 1)
            h = layer.linear(x % self.e, W2b.to(dtype))[..., None, :]  # (..., 1, R)
        elif self.kind == "conv":
            blocks = x.unflatten(1, (self.c, self.e)).flatten(0, 1)  # (B c, e, ...)
            h = layer.linear(blocks, W2b.to(dtype)).unflatten(0, (-1, self.c))  # (B, c, R, ...)
            h = h.movedim((1, 2), (-2, -1))
        else:
            h = layer.linear(x.unflatten(-1, (self.c, self.e)), W2b.to(dtype))  # (..., c, R)
        h = W1 @ h  # (..., a, R)
        return (h if W2a is None else F.linear(h, W2a.to(dtype))).flatten(-2)


@dataclass(frozen=True)
class LoKr(Lycoris):
    """Low-rank Kronecker products on linear, convolution and embedding weights."""

    peft_type: ClassVar[str | None] = "LOKR"
    hf_fields: ClassVar[Mapping[str, str]] = {
        **Lycoris.hf_fields,
        "decompose_both": "decompose_both",
        "decompose_factor": "decompose_factor",
        "rank_dropout_scale": "rank_dropout_scale",
    }

    rank_dropout_scale: bool = False
    decompose_both: bool = False
    decompose_factor: Annotated[int, Ge(-1)] = -1
    init: Literal["default", "lycoris"] = "default"

    def build(self, site: Site) -> LoKrDelta:
        """The factors of the site."""
        return LoKrDelta(self, site)

    def hf_module(self, module: nn.Module, delta: Delta) -> dict[str, Tensor]:
        """The factors that there are; a convolution's have its kernel's sides."""
        assert isinstance(delta, LoKrDelta)
        held: dict[str, Tensor] = dict(delta.named_parameters())
        if "T2" in held:
            held["T2"] = hf_core(module, held["T2"])
        elif "W2" in held and delta.kind == "conv":
            sides: Any = module.kernel_size
            held["W2"] = held["W2"].view(len(held["W2"]), -1, *sides)
        names = {"W1": "w1", "W1a": "w1_a", "W1b": "w1_b", "W2": "w2", "W2a": "w2_a", "W2b": "w2_b"}
        return {f"lokr_{(names | {'T2': 't2'})[ours]}": tensor for ours, tensor in held.items()}
