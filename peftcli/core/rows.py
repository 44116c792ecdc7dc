"""Deltas on parts of a fused linear: the roles q, k, v of GPT-2's `c_attn` are row ranges of one
weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from peftcli.core.delta import Delta
from peftcli.core.layer import Layer


class RowLayer:
    """Rows `index` (K,) of a linear layer, as a layer; reuses the output `y` that was made from `x`
    already.
    """

    is_plain = False

    def __init__(self, inner: Layer, index: Tensor, x: Tensor, y: Tensor) -> None:
        self.inner, self.index, self.x, self.y = inner, index, x, y
        self.dtype = y.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """The rows' output for `x`."""
        y = self.y if x is self.x else self.inner(x)
        return y.index_select(-1, self.index)

    @property
    def module(self) -> nn.Module:
        """The fused module."""
        return self.inner.module

    @property
    def weight(self) -> Tensor:
        """(K, I)."""
        return self.inner.weight.index_select(0, self.index)

    @property
    def bias(self) -> Tensor | None:
        """(K,) or None."""
        return None if self.inner.bias is None else self.inner.bias.index_select(0, self.index)

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        """The module's product with `W` in place of its weight."""
        return self.inner.linear(x, W, b)

    def mix(self, h: Tensor, B: Tensor) -> Tensor:
        """`B` (K, R) on the channels of `h`."""
        return self.inner.mix(h, B)


class RowsDelta(Delta):
    """One delta for each role of a fused linear, each on its own output rows; the other rows pass
    unchanged.
    """

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.d_out = d_out
        self.parts = nn.ModuleDict()  # role: delta

    def add(self, role: str, rows: tuple[tuple[int, int], ...], delta: Delta) -> None:
        """Put `delta` on the output rows in the (start, stop) ranges `rows`."""
        index = torch.cat([torch.arange(start, stop) for start, stop in rows])
        self.parts[role] = delta.train(self.training)
        self.register_buffer(f"index_{role}", index, persistent=False)

    def part(self, role: str | None) -> Delta:
        """The delta of the role."""
        return cast(Delta, self.parts[role or ""])

    def index(self, role: str) -> Tensor:
        """The output rows (K,) of the role."""
        return self.get_buffer(f"index_{role}")

    def side_by_side(self, columns: Mapping[str, Tensor]) -> Tensor:
        """One matrix (O, sum of R) of each role's `columns` (K, R), zero on other rows."""
        parts = list(columns.values())
        wide = parts[0].new_zeros(self.d_out, sum(part.shape[1] for part in parts))
        start = 0
        for role, part in columns.items():
            wide[self.index(role), start : start + part.shape[1]] = part.detach()
            start += part.shape[1]
        return wide

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """The layer's output with each role's rows replaced by its delta's."""
        y = whole = layer(x)
        for role, delta in self.parts.items():
            index = self.index(role)
            y = y.index_copy(-1, index, delta(x, RowLayer(layer, index, x, whole)).to(y.dtype))
        return y

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Each role's rows folded, the others as they are."""
        for role in self.parts:
            index = self.index(role)
            W_rows, b_rows = self.part(role).merged(W[index], None if b is None else b[index])
            W = W.to(W_rows.dtype).index_copy(0, index, W_rows)
            if b_rows is not None:
                b = b_rows.new_zeros(self.d_out) if b is None else b
                b = b.index_copy(0, index, b_rows.to(b.dtype))
        return W, b
