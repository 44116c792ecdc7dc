"""Compacter: Efficient Low-Rank Hypercomplex Adapter Layers. Karimi Mahabadi, Henderson and Ruder,
NeurIPS 2021, arXiv 2106.04647.

    a = u + up(act(down(u))),   y = x H + b,   H = sum_i kron(A_i, W_i)        (I, O)
    H[a p + k, c q + l] = sum_i A_i[a, c] W_i[k, l],   p = I / n,  q = O / n
    A (n, n, n),   W_i = s_i t_i,   s (n, p, R),  t (n, R, q)

An adapter whose matrices are sums of n Kronecker products: n^3 numbers, shared by all layers, hold
what adapters have in common, and a thin product what is each layer's own.

Variants: `compacter` behind self-attention and feed-forward, `compacter++` behind feed-forward
alone, `phm` with a rule A and whole W_i of its own in every layer; and `low_rank`, which the paper
compares with: no rules, H = s t with s (I, R), t (R, O). The norms of the base train too.
With factors H is never made: x is seen as (n, p), and three small products follow. With whole W_i
it is made: a token costs I O multiplications either way, and n times the memory without. Where
rules are shared they start at N(0, phm_init_range^2), so small that the start is the base to 1e-7;
those of `phm` at N(0, 0.01^2), whatever the range, as in the code. `factorized_rule` makes A_i =
l_i r_i' of two vectors with the same start, which the code gives each by itself. The code's
`low_rank` multiplies its factors entry by entry, right for rank 1 alone; here they are matrices.
What is published keeps the products' parts; it is not spread into a plain adapter of H.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from peftcli.core.method import Method
from peftcli.errors import ConfigError
from peftcli.methods.adapter import (
    Activation,
    AdapterDelta,
    Bottleneck,
    places,
    train_norms,
)

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class Rule(nn.Module):
    """A (n, n, n): the n small matrices of the Kronecker products; with `factorized`, each the
    product of two vectors.
    """

    def __init__(self, n: int, std: float, factorized: bool, learn: bool) -> None:
        super().__init__()
        self.left, self.right, self.A = None, None, None
        if factorized:
            self.left = nn.Parameter(std * torch.randn(n, n, 1), learn)
            self.right = nn.Parameter(std * torch.randn(n, 1, n), learn)
        else:
            self.A = nn.Parameter(std * torch.randn(n, n, n), learn)

    def forward(self) -> Tensor:
        """A (n, n, n)."""
        if self.A is not None:
            return self.A
        assert self.left is not None
        assert self.right is not None
        return self.left @ self.right


class Weights(nn.Module):
    """W (n, p, q), or its factors s (n, p, R) and t (n, R, q)."""

    def __init__(self, n: int, p: int, q: int, rank: int | None) -> None:
        super().__init__()
        self.W, self.s, self.t = None, None, None
        if rank is None:
            self.W = _xavier(n, p, q)
        else:
            self.s, self.t = _xavier(n, p, rank), _xavier(n, rank, q)

    def mix(self, x: Tensor, A: Tensor) -> Tensor:
        """sum_i x_a A_i[a, c] W_i: (..., n, p) -> (..., n, q)."""
        A = A.to(x.dtype)
        if self.W is not None:
            H = torch.einsum("iac,ipq->apcq", A, self.W.to(x.dtype))
            return torch.einsum("...ap,apcq->...cq", x, H)
        assert self.s is not None
        assert self.t is not None
        z = torch.einsum("...ap,ipr->...iar", x, self.s.to(x.dtype))
        z = torch.einsum("...iar,iac->...icr", z, A)
        return torch.einsum("...icr,irq->...cq", z, self.t.to(x.dtype))


def _xavier(n: int, rows: int, columns: int) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(n, rows, columns))
    for each in weight.data:  # fans of one matrix, not of the stack
        nn.init.xavier_uniform_(each, gain=2**0.5)
    return weight


class PHM(nn.Module):
    """y = x H + b (Zhang et al. 2021, arXiv 2102.08597). What is given in a tuple is shared, and
    registered elsewhere.
    """

    def __init__(
        self,
        n: int,
        O: int,  # noqa: E741
        rule: Rule | tuple[Rule],
        weights: Weights | tuple[Weights],
    ) -> None:
        super().__init__()
        self.n, self.rule, self.weights = n, rule, weights
        self.b = nn.Parameter(torch.zeros(O))  # (O,)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        rule = self.rule[0] if isinstance(self.rule, tuple) else self.rule
        weights = self.weights[0] if isinstance(self.weights, tuple) else self.weights
        h = weights.mix(x.unflatten(-1, (self.n, -1)), rule())
        return h.flatten(-2) + self.b.to(h.dtype)


class LowRank(nn.Module):
    """y = x s t + b, without rules."""

    def __init__(self, I: int, O: int, rank: int) -> None:  # noqa: E741
        super().__init__()
        self.s, self.t = _xavier(1, I, rank), _xavier(1, rank, O)
        self.b = nn.Parameter(torch.zeros(O))  # (O,)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return x @ self.s[0].to(x.dtype) @ self.t[0].to(x.dtype) + self.b.to(x.dtype)


@dataclass(frozen=True)
class Compacter(Method):
    """Adapters of Kronecker products, behind self-attention and feed-forward."""

    family: ClassVar[str] = "adapter"  # starts at the base to 1e-7
    size_option: ClassVar[str | None] = "reduction_factor"

    variant: Literal["compacter", "compacter++", "phm", "low_rank"] = "compacter"
    n: Annotated[int, Ge(1)] = 4
    reduction_factor: Annotated[float, Gt(0)] = 32.0
    rank: Annotated[int, Ge(1)] = 1
    phm_init_range: Annotated[float, Gt(0)] = 1e-4
    learn_phm: bool = True
    factorized_rule: bool = False
    shared_w: bool = False
    act: Activation = "gelu_new"
    train_layernorm: bool = True

    def __post_init__(self) -> None:
        """Refuse options of rules where there are none."""
        if self.variant == "low_rank" and (self.factorized_rule or self.shared_w):
            raise ConfigError(
                "method.factorized_rule and method.shared_w are of rules, which "
                "method.variant=low_rank does not have."
            )

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """One shared rule, and an adapter at every place."""
        positions = ("ffn",) if self.variant == "compacter++" else ("attn", "ffn")
        subs = places(host, positions, ())
        widths = {sub.end.d_out for sub in subs}
        for D in widths if self.variant != "low_rank" else ():
            self._check(D)
        if self.shared_w and len(widths) > 1:
            raise ConfigError(f"method.shared_w=true needs one width; here are {sorted(widths)}.")
        held = nn.ModuleDict()
        if self.variant in ("compacter", "compacter++"):
            held["rule"] = self._rule()
        if self.shared_w:
            D = next(iter(widths))
            held["down"] = self._weights(D, self.width(D))
            held["up"] = self._weights(self.width(D), D)
        if held:
            host.share(held.to(subs[0].end.device))
        for sub in subs:
            host.graft(sub.end, AdapterDelta(self._core(sub.end.d_out, held)))
        if self.train_layernorm:
            train_norms(host)

    def width(self, D: int) -> int:
        """The bottleneck: D / reduction_factor, and no narrower than the rules."""
        return max(1 if self.variant == "low_rank" else self.n, int(D / self.reduction_factor))

    def _check(self, D: int) -> None:
        for name, size in (("width", D), ("bottleneck", self.width(D))):
            if size % self.n:
                raise ConfigError(
                    f"method.n={self.n} does not divide the {name} {size}; choose n and "
                    f"method.reduction_factor so that n divides {D} and {D} / reduction_factor."
                )

    def _rule(self) -> Rule:
        std = 0.01 if self.variant == "phm" else self.phm_init_range
        return Rule(self.n, std, self.factorized_rule, self.learn_phm)

    def _weights(self, I: int, O: int) -> Weights:  # noqa: E741
        rank = None if self.variant == "phm" else self.rank
        return Weights(self.n, I // self.n, O // self.n, rank)

    def _core(self, D: int, held: nn.ModuleDict) -> Bottleneck:
        def layer(I: int, O: int, name: str) -> nn.Module:  # noqa: E741
            if self.variant == "low_rank":
                return LowRank(I, O, self.rank)
            rule = (held["rule"],) if "rule" in held else self._rule()
            weights = (held[name],) if name in held else self._weights(I, O)
            return PHM(self.n, O, rule, weights)  # pyright: ignore[reportArgumentType]

        R = self.width(D)
        return Bottleneck(D, layer(D, R, "down"), layer(R, D, "up"), self.act)
