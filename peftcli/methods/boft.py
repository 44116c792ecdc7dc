"""BOFT: OFT's rotation as a product of sparse butterfly factors.

"Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", Liu et al., ICLR 2024,
arXiv 2311.06243.

    y = s * (W (x Rot)) + b      Rot (I, I) = F_{m-1} ... F_0      s (O,)
    F_i = P_i blockdiag(O_i) P_i'      O = (I - S)(I + S)^-1,  S = (R - R')/2,  R (m, I/b, b, b)

P_i mixes half-blocks of 2^i neighbouring blocks, so that log2(I/b) + 1 factors of small blocks
reach every output from every input: a dense rotation for O(I log I) numbers.

F_i mixes numbers within chunks of b 2^i, and so does the product of the factors up to it: where the
chunks are small, that product is made, as blocks, and the input is turned once. Else each factor is
a gather and a product of small blocks. Hugging Face peft makes every P_i and F_i as a dense (I, I)
matrix; it silently computes one factor where its CUDA extension is missing, so adapters of more
than one are kept in our own format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from peftcli.core.delta import Delta
from peftcli.core.layer import Layer
from peftcli.core.method import Method
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.kernels.block_rotation import block_rotation
from peftcli.methods.rotation import (
    RotationDelta,
    cayley,
    identity_like,
    random_blocks,
    refuses_rotation,
)

if TYPE_CHECKING:
    from peftcli.core.host import Host


# Features that a product of factors mixes, up to which it is made: as blocks of that size.
MIXED = 64


def butterfly(d: int, b: int, i: int) -> Tensor:
    """p (d,): within chunks of 2^i blocks of b, the half-blocks of even number first, then those of
    odd number.
    """
    halves = torch.arange(d).view(-1, 2**i, 2, b // 2)  # (chunks, blocks, even | odd, b/2)
    return halves.transpose(1, 2).reshape(d)


class BOFTDelta(RotationDelta):
    """y = s * (W (x Rot)) + b, Rot = F_{m-1} ... F_0 (Liu et al. 2024)."""

    def __init__(self, site: Site, m: int, b: int, p: float) -> None:
        super().__init__(site)
        self.b, self.p = b, p
        self.R = nn.Parameter(torch.zeros(m, site.d_in // b, b, b))  # (m, I/b, b, b), zero: O = I
        self.s = nn.Parameter(torch.ones(site.d_out))  # (O,), a vector: scales do not decay
        orders = [butterfly(site.d_in, b, i) if i else torch.arange(site.d_in) for i in range(m)]
        self.order: Tensor  # p of every factor (m, I), and its inverse
        self.inverse: Tensor
        self.register_buffer("order", torch.stack(orders), persistent=False)
        self.register_buffer("inverse", self.order.argsort(1), persistent=False)

    def blocks(self) -> Tensor:
        """O (m, I/b, b, b)."""
        return cayley((self.R.mT - self.R) / 2)  # (I + Q)(I - Q)^-1 with Q = -S

    def dropped(self, R: Tensor) -> Tensor:
        """In one random factor int(p n) random blocks are the identity."""
        if not self.p:
            return R
        m, n = R.shape[:2]
        chosen = torch.randint(m, (1,), device=R.device) == torch.arange(m, device=R.device)
        mask = chosen[:, None] & random_blocks(n, self.p, R.device)
        return torch.where(mask[..., None, None], identity_like(R), R)

    def turn(self, x: Tensor, R: Tensor, back: bool = False) -> Tensor:
        """x through all factors; those that mix few numbers are multiplied first."""
        d, mixed = x.shape[-1], self.b * 2 ** (len(R) - 1)
        if len(R) == 1 or mixed > MIXED or x.numel() < mixed * d:
            return self.through(x, R, back)
        units = torch.eye(mixed, dtype=R.dtype, device=R.device).repeat(1, d // mixed)
        product = self.through(units, R, back).unflatten(1, (-1, mixed)).transpose(0, 1)
        return block_rotation(x, product)  # (I / mixed, mixed, mixed)

    def through(self, x: Tensor, R: Tensor, back: bool) -> Tensor:
        """Factor by factor: gather, blocks, gather back; the first gathers nothing."""
        for i in range(len(R)) if back else reversed(range(len(R))):
            O_i = R[i].mT if back else R[i]
            if i:
                x = block_rotation(x[..., self.inverse[i]], O_i)[..., self.order[i]]
            else:
                x = block_rotation(x, O_i)
        return x

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """s * (W Rot')."""
        return self.s[:, None] * self.turned(W), b

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """s * (W (x Rot)) + b: the bias is not scaled."""
        y, b = super().forward(x, layer), layer.bias
        channels = (-1,) if self.turns_input else (-1, *[1] * (y.ndim - 2))
        s = self.s.view(channels).to(y.dtype)
        if b is None:
            return s * y
        return torch.addcmul((1 - s) * b.view(channels).to(y.dtype), s, y)


@dataclass(frozen=True)
class BOFT(Method):
    """Butterfly rotation of the inputs of linear layers, and a scale of their outputs."""

    family: ClassVar[str] = "structured"
    size_option: ClassVar[str | None] = "block_size"
    peft_type: ClassVar[str | None] = "BOFT"
    hf_fields: ClassVar[Mapping[str, str]] = {
        "block_size": "boft_block_size",
        "block_num": "boft_block_num",
        "n_butterfly": "boft_n_butterfly_factor",
        "dropout": "boft_dropout",
    }
    hf_harmless: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "init_weights"})

    block_size: Annotated[int, Ge(0)] = 4
    block_num: Annotated[int, Ge(0)] = 0
    n_butterfly: Annotated[int, Ge(1)] = 1
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | tuple[str, ...] = ("q", "v")

    def __post_init__(self) -> None:
        if bool(self.block_size) == bool(self.block_num):
            raise ConfigError(
                f"method.block_size={self.block_size} and method.block_num={self.block_num}: give "
                "one of them and set the other to 0; their product is the layer's width."
            )

    def block_of(self, site: Site) -> int:
        """The size b of the site's blocks; its width must be divisible as the factors ask."""
        name = "block_size" if self.block_size else "block_num"
        given, d = self.block_size or self.block_num, site.d_in
        b = self.block_size or d // given
        parts = b * 2 ** (self.n_butterfly - 1)  # inputs that the last factor mixes
        if d % given or d % parts or (self.n_butterfly > 1 and b % 2):
            raise ConfigError(
                f"method.{name}={given} with method.n_butterfly={self.n_butterfly} does not fit the"
                f" width {d} of {site.path}: it must be a multiple of b 2^(n_butterfly - 1), and b "
                "even for more than one factor."
            )
        return b

    def build(self, site: Site) -> BOFTDelta:
        """The identity, as factors, and a scale of one."""
        return BOFTDelta(site, self.n_butterfly, self.block_of(site), self.dropout)

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """Several factors need its CUDA extension, which it does without silently."""
        if self.n_butterfly > 1:
            return "without its CUDA extension peft computes one butterfly factor alone"
        return refuses_rotation(host, name)

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """Fields with one value here."""
        return {"bias": "none", "init_weights": True}

    def hf_module(self, module: nn.Module, delta: Delta) -> dict[str, Tensor]:
        """peft's scale is a column."""
        held = cast(BOFTDelta, delta)
        return {"boft_R": held.R, "boft_s": held.s[:, None]}
