"""OFT: orthogonal fine-tuning, in its input-centric form.

"Controlling Text-to-Image Diffusion by Orthogonal Finetuning", Qiu et al., NeurIPS 2023, arXiv
2306.07280; "Orthogonal Finetuning Made Scalable" (OFTv2), Qiu et al. 2025, arXiv 2506.19847.

    y = W (x Rot) + b        Rot (I, I) = blockdiag(R_1 ... R_r), R_k (b, b) orthogonal, r = I / b
    R_k = (I + Q_k)(I - Q_k)^-1, or the first terms of its series        Q_k = -Q_k', strict upper
                                                                         triangle q_k trained

A rotation keeps the norms of neurons and the angles between them.

Where we depart from Hugging Face peft: its exact branch computes (I - Q)(I + Q)^-1 and its series
the inverse of that; ours is one sign for both, and q changes its sign on the way to and from peft's
files of the exact form. COFT's ball is kept after each step, not within the forward pass.
`module_dropout` acts, which peft only stores. A convolution's kernel is turned, so that the
patches' outputs are those of the folded kernel; peft turns overlapping patches and adds them up.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from peftcli.core.delta import Delta
from peftcli.core.method import Method, Step
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


def cayley_neumann(Q: Tensor, terms: int) -> Tensor:
    """I + 2 Q + ... + 2 Q^(N-2) + Q^(N-1), near `cayley` while Q is small; N = 3 gives N = 4."""
    R, power = identity_like(Q) + 2 * Q, Q
    if terms == 2:
        return R
    for _ in range(max(terms, 4) - 3):
        power = power @ Q
        R = R + 2 * power
    return R + power @ Q


class OFTDelta(RotationDelta):
    """Rot = blockdiag(R_1 ... R_r), each R_k from the skew matrix of q_k (Qiu et al. 2025)."""

    def __init__(self, site: Site, b: int, terms: int | None, shared: bool, p: float) -> None:
        super().__init__(site)
        self.b, self.terms, self.p = b, terms, p
        n = 1 if shared else site.d_in // b
        self.q = nn.Parameter(torch.zeros(n, b * (b - 1) // 2))  # (r, b(b-1)/2), zero so R = I
        rows, columns = torch.triu_indices(b, b, 1)
        self.upper: Tensor  # where q stands in a flat (b, b) matrix
        self.register_buffer("upper", rows * b + columns, persistent=False)

    def skew(self) -> Tensor:
        """Q (r, b, b): q above the diagonal, -q below."""
        n, b = len(self.q), self.b
        Q = self.q.new_zeros(n, b * b).index_copy(1, self.upper, self.q).view(n, b, b)
        return Q - Q.mT

    def blocks(self) -> Tensor:
        """R (r, b, b)."""
        Q = self.skew()
        return cayley(Q) if self.terms is None else cayley_neumann(Q, self.terms)

    def dropped(self, R: Tensor) -> Tensor:
        """int(p r) random blocks are the identity."""
        mask = random_blocks(len(R), self.p, R.device)
        return torch.where(mask[:, None, None], identity_like(R), R) if self.p else R

    def turn(self, x: Tensor, R: Tensor, back: bool = False) -> Tensor:
        """Block k of the features times R_k, or its transpose."""
        R = (R.mT if back else R).expand(x.shape[-1] // self.b, -1, -1)
        return block_rotation(x, R)

    @torch.no_grad()
    def project(self, eps: float) -> None:
        """COFT: |Q_k| in Frobenius norm is at most eps / sqrt(r)."""
        radius = eps / len(self.q) ** 0.5
        norms = self.q.norm(dim=1, keepdim=True) * 2**0.5  # every number stands in Q twice
        self.q.mul_((radius / norms).clamp(max=1).nan_to_num(1.0))


@dataclass(frozen=True)
class OFT(Method):
    """Block-diagonal rotation of the inputs of linear layers."""

    family: ClassVar[str] = "structured"
    size_option: ClassVar[str | None] = "block_size"
    peft_type: ClassVar[str | None] = "OFT"
    hf_fields: ClassVar[Mapping[str, str]] = {
        "block_size": "oft_block_size",
        "r": "r",
        "coft": "coft",
        "eps": "eps",
        "block_share": "block_share",
        "cayley_neumann": "use_cayley_neumann",
        "terms": "num_cayley_neumann_terms",
        "module_dropout": "module_dropout",
    }
    hf_harmless: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "init_weights"})

    block_size: Annotated[int, Ge(0)] = 32
    r: Annotated[int, Ge(0)] = 0
    coft: bool = False
    eps: Annotated[float, Gt(0)] = 6e-5
    block_share: bool = False
    cayley_neumann: bool = True
    terms: Annotated[int, Ge(2)] = 5
    module_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    target_modules: str | tuple[str, ...] = ("q", "v")

    def __post_init__(self) -> None:
        if bool(self.block_size) == bool(self.r):
            raise ConfigError(
                f"method.block_size={self.block_size} and method.r={self.r}: give one of them and "
                "set the other to 0; their product is the layer's width."
            )

    def block_of(self, d_in: int) -> int:
        """The size b of a layer's blocks; warns where it is not what was asked for."""
        wanted = self.block_size or self.r
        found = nearest_divisor(wanted, d_in)
        if found != wanted:
            name = "block_size" if self.block_size else "r"
            warnings.warn(
                f"method.{name}={wanted} does not divide the width {d_in}: {found} there.",
                stacklevel=2,
            )
        return found if self.block_size else d_in // found

    def build(self, site: Site) -> OFTDelta:
        """The identity, as blocks."""
        terms = self.terms if self.cayley_neumann else None
        b = self.block_of(site.d_in)
        if b == 1:
            raise ConfigError(
                f"method.block_size={self.block_size}, method.r={self.r}: blocks of one number, as "
                f"they are at {site.path} of width {site.d_in}, do not turn. Take larger blocks, "
                "or leave the layer out of method.target_modules."
            )
        return OFTDelta(site, b, terms, self.block_share, self.module_dropout)

    def after_step(self, host: Host, t: Step) -> None:
        """COFT keeps every block in its ball."""
        if self.coft:
            for name, method in host.adapters.items():
                if method is self:
                    self._project(host, name)

    def _project(self, host: Host, name: str) -> None:
        for _, delta in host.deltas(name):
            cast(OFTDelta, delta).project(self.eps)

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """Its layers turn the inputs of whole linear layers."""
        return refuses_rotation(host, name)

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """The version names the form of the series, which changed in 0.18."""
        return {"peft_version": "0.18.0", "bias": "none", "init_weights": True}

    def hf_module(self, module: nn.Module, delta: Delta) -> dict[str, Tensor]:
        """q, with peft's sign in the exact form."""
        q = cast(OFTDelta, delta).q
        return {"oft_R.weight": q if self.cayley_neumann else -q}

    def load_hf(self, host: Host, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Copy q; peft projects COFT's on the way into its next forward pass."""
        for site, delta in host.deltas(name):
            q = tensors[f"{site.path}.oft_R.weight"]
            cast(OFTDelta, delta).q.copy_(q if self.cayley_neumann else -q)
        if self.coft:
            self._project(host, name)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ValueError for forms that peft computed differently when it wrote them."""
        if "oft_block_size" not in config:
            raise ValueError("written by peft before 0.14, whose OFT was another one.")
        version = str(config.get("peft_version") or "0.0").split(".")
        if config.get("use_cayley_neumann", True) and [int(v) for v in version[:2]] < [0, 18]:
            raise ValueError("written by peft before 0.18, whose series had another last term.")
        return {}


def nearest_divisor(wanted: int, d: int) -> int:
    """The divisor of d nearest to `wanted`, the smaller one on a tie; d itself from d on."""
    divisors = [n for n in range(1, d + 1) if d % n == 0]
    return min(divisors, key=lambda n: (abs(n - wanted), n))
