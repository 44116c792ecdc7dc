"""Changes of an attention's single heads, before its output projection: the place `head` in the
design space of He, Zhou et al., ICLR 2022, arXiv 2110.04366.

    h' = h + f(q P_k') P_v        f ReLU or softmax, P_k, P_v (R, D / H) for each of H heads
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.core.layer import Layer
from peftcli.core.site import Site
from peftcli.errors import NotApplicable
from peftcli.methods.adapter import LentDelta, Norm

if TYPE_CHECKING:
    from peftcli.core.host import Host


class HeadsDelta(LentDelta):
    """At the output projection: every head's output h + f(q P_k') P_v (He et al. 2022, table 1)."""

    def __init__(
        self, q: Site, width: int, sizes: tuple[int, float], R: int, kind: str, p: float
    ) -> None:
        super().__init__()
        self.q, self.dropout, self.relu = (q,), p, kind == "cross_attn_relu"
        self.heads, self.scaling = width // sizes[0], sizes[1]
        self.P_k = nn.Parameter(0.02 * torch.randn(R, width))  # (R, D), all heads side by side
        self.P_v = nn.Parameter(0.02 * torch.randn(R, width))  # (R, D)
        self.norm = None if kind == "cross_attn_noln" else Norm(q.d_in)

    def change(self, q: Tensor) -> Tensor:
        """dh (B, T, D) for queries (B, T, D)."""
        K, V = (P.to(q.dtype).unflatten(1, (self.heads, -1)) for P in (self.P_k, self.P_v))
        scores = torch.einsum("bthd,rhd->bthr", q.unflatten(-1, (self.heads, -1)), K)
        if self.relu:
            weights = F.dropout(scores.relu(), self.dropout, self.training)
        else:
            weights = scores.softmax(-1).to(q.dtype)
        return torch.einsum("bthr,rhd->bthd", weights, V).flatten(-2)

    def queries(self, x: Tensor) -> Tensor:
        """Wq LN?(x); with softmax, scaled as the attention scales them."""
        (site,) = self.q
        q = site.module(x if self.norm is None else self.norm(x))
        if site.rows is not None:
            q = torch.cat([q[..., start:stop] for start, stop in site.rows], -1)
        return q if self.relu else q * self.scaling

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """The layer reads x + dh."""
        return layer(x + self.change(self.queries(self.take())))


def head_sizes(host: Host, q: Site) -> tuple[int, float]:
    """Features of one head of the attention module that holds `q`, and the factor on its scores."""
    module: Any = host.model.get_submodule(q.path.rpartition(".")[0])
    names = ("head_dim", "attention_head_size", "key_value_proj_dim")
    found = [vars(module)[n] for n in names if n in vars(module)]
    if not found:
        raise NotApplicable(
            f"{type(module).__name__} does not tell the size of its heads; take "
            "method.attn_kind=parallel."
        )
    return found[0], vars(module).get("scaling", found[0] ** -0.5)
