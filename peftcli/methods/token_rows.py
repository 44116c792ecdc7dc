"""Rows of the token table that train alone, for a few tokens that are new or mean something else;
Hugging Face peft calls them trainable tokens.

    W'[ids] = rows        rows (K, D) train, all other rows of the table (V, D) rest
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcli.core.delta import WeightDelta
from peftcli.core.layer import Layer
from peftcli.core.site import Site, path_of
from peftcli.errors import ConfigError, NotApplicable

if TYPE_CHECKING:
    from peftcli.core.host import Host


class TokenRows(WeightDelta):
    """W'[ids] = rows: chosen rows of a token table; a head that shares the table shares them."""

    index: Tensor
    slot: Tensor

    def __init__(self, site: Site, ids: Sequence[int], table: TokenRows | None = None) -> None:
        super().__init__()
        V = site.d_in if site.kind == "embedding" else site.d_out
        index, slot = torch.tensor(ids), torch.full((V,), len(ids))
        slot[index] = torch.arange(len(ids))
        self.register_buffer("index", index, persistent=False)  # (K,)
        self.register_buffer("slot", slot, persistent=False)  # (V,): place in `rows`, K elsewhere
        self.is_table = site.kind == "embedding"
        self.table = (table,) if table else ()  # in a tuple, so that it is saved once
        if table is None:
            self.rows = nn.Parameter(site.weight[:, ids].T.float().clone())  # (K, D)

    def delta(self, W: Tensor) -> Tensor:
        """The change of W, (D, V) or (V, D): zero outside of the rows."""
        rows = self._rows()
        if self.is_table:
            change = rows.T - W[:, self.index]
            return torch.zeros_like(W, dtype=rows.dtype).index_copy(1, self.index, change)
        change = rows - W[self.index]
        return torch.zeros_like(W, dtype=rows.dtype).index_copy(0, self.index, change)

    def _rows(self) -> Tensor:
        return self.table[0].rows if self.table else self.rows

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """What is looked up, or its products, with the chosen rows in their place."""
        y, rows = layer(x), self._rows()
        if not self.is_table:
            b = None if layer.bias is None else layer.bias[self.index]
            mine = layer.linear(x, rows.to(x.dtype), b)
            return y.index_copy(-1, self.index, mine.to(y.dtype))
        slot = self.slot[x]
        table = torch.cat([rows, torch.zeros_like(rows[:1])])  # (K + 1, D)
        mine = layer.linear(slot, table.T)
        return torch.where((slot < len(rows))[..., None], mine.to(y.dtype), y)


def train_rows(host: Host, ids: Sequence[int]) -> None:
    """Graft the rows `ids` on the input embeddings; a head tied to them sees the same. Raises
    `ConfigError` for ids that are no different rows, `NotApplicable` for a model without a table.
    """
    model = cast(PreTrainedModel, host.model)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(table, nn.Embedding):
        raise NotApplicable(
            f"{type(model).__name__} has no token embeddings: leave method.token_ids empty."
        )
    wrong = [i for i in ids if i >= table.num_embeddings]
    if wrong or len(set(ids)) < len(ids):
        raise ConfigError(
            f"method.token_ids={list(ids)}: must be different numbers below {table.num_embeddings}."
        )
    sites = [site for site in host.find("embed") if site.module.weight is table.weight]
    if head is not None and head.weight is table.weight:
        sites += host.find(path_of(model, head))
    rows = TokenRows(sites[0], ids)
    for i, site in enumerate(sites):
        host.graft(site, TokenRows(site, ids, rows) if i else rows)
    host.matched[host.building] = {"rows of the token table": len(ids)}
