"""Head of the key-value prefixes: P trained keys and values in front of an attention's own, the map
that makes them while they train, where they sit, and the positions of the tokens behind them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcli.core.delta import Delta
from peftcli.core.layer import Layer
from peftcli.core.site import Site, find_sites
from peftcli.errors import NotApplicable
from peftcli.kernels.precision import own_dtype
from peftcli.models.attention import KeysValues, KeyValueDelta, is_registered
from peftcli.models.roles import is_cross

if TYPE_CHECKING:
    from peftcli.core.host import Host


class PrefixEncoder(nn.Module):
    """tanh(A E) (P, m), which the layers of one prefix share."""

    def __init__(self, P: int, d: int, m: int) -> None:
        super().__init__()
        self.E = nn.Parameter(torch.randn(P, d))  # (P, d)
        self.A = nn.Linear(d, m)  # (m, d)

    def forward(self) -> Tensor:
        """tanh(A E), (P, m)."""
        return self.A(self.E).tanh()


class PrefixDelta(KeyValueDelta):
    """[K_p | V_p] = W, or B tanh(A E) while it trains (Li and Liang 2021, section 4.3)."""

    def __init__(
        self, P: int, d_kv: int, encoder: PrefixEncoder | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout, self.encoder = dropout, (encoder,)
        self.W, self.B = None, None
        if encoder is None:
            self.W = nn.Parameter(torch.randn(P, 2 * d_kv))  # (P, 2 G D)
        else:
            self.B = nn.Linear(encoder.A.out_features, 2 * d_kv)  # (2 G D, m)

    def table(self) -> Tensor:
        """[K_p | V_p] (P, 2 G D), in its own type: what is folded is what was trained."""
        if self.B is None:
            assert self.W is not None
            return self.W
        with own_dtype(self.B.weight):
            return self.B(cast(PrefixEncoder, self.encoder[0])())

    def keys_values(self, B: int) -> KeysValues:
        """K_p and V_p of `B` rows; each row drops its own entries while training."""
        H = F.dropout(self.table().expand(B, -1, -1), self.dropout, self.training)
        K, V = H.chunk(2, -1)
        return K, V

    @torch.no_grad()
    def fold(self) -> None:
        """Keep W = B tanh(A E) in place of B."""
        if self.B is None:
            return
        self.W = nn.Parameter(self.table().clone())
        self.B, self.encoder = None, (None,)


class PositionShift(Delta):
    """position_ids + P at the model site; `start` is the model's first position."""

    def __init__(self, P: int, start: int) -> None:
        super().__init__()
        self.P, self.start = P, start
        self.takes_positions = P

    def forward(self, x: dict[str, Any], layer: Layer) -> Any:
        """The model on the batch with shifted positions."""
        positions, cache = x.get("position_ids"), x.get("past_key_values")
        if positions is None:
            tokens = x["input_ids"] if x.get("input_ids") is not None else x["inputs_embeds"]
            seen = self.start + (0 if cache is None else int(cache.get_seq_length()))
            positions = torch.arange(seen, seen + tokens.shape[1], device=tokens.device)[None]
        return layer({**x, "position_ids": positions + self.P})


def prefixes_of(host: Host, name: str) -> Iterator[PrefixDelta]:
    """The prefixes of an adapter, layer by layer; an encoder's before its decoder's."""
    return (delta for _, delta in host.deltas(name) if isinstance(delta, PrefixDelta))


def fold_prefixes(host: Host, name: str) -> None:
    """Keep the tables of an adapter's prefixes and drop the map that made them."""
    for delta in prefixes_of(host, name):
        delta.fold()
    host.unshare(name)


def find_cores(host: Host, leave_out: Sequence[int]) -> dict[str, list[Site]]:
    """Attention modules outside the layers left out, by the kind of their prefix; a site's width is
    that of its keys. Raises `NotApplicable` where the attention does not ask the registry.
    """
    model, layout = host.model, host.layout
    if not is_registered(model):
        raise NotApplicable(
            f"{type(model).__name__} computes its attention on its own: prefixes need a model that "
            "goes through transformers' attention registry with sdpa (Llama, GPT-2, BERT, T5, ...)."
        )
    host.refuse_layers(leave_out)
    towers = {path: layout.tower_of(path) for path in layout.attention_cores}
    held = [p for p, tower in towers.items() if tower == "text"] or list(towers)
    held = [p for p in held if layout.block_of(p) not in leave_out]
    if leave_out and not held:
        raise NotApplicable(f"method.leave_out={list(leave_out)} leaves no layer for a prefix.")
    widths = {role: _widths(host, role) for role in ("k", "v")}
    if not held or any(p not in w for w in widths.values() for p in held):
        raise NotApplicable(
            f"{type(model).__name__} has attention without keys and values of its own: prefixes "
            "need a linear of role k and one of role v in each attention."
        )
    cores: dict[str, list[Site]] = {}
    for path in held:
        kind = "cross" if is_cross(path) else towers[path] or "text"
        width, module = widths["k"][path], model.get_submodule(path)
        site = Site(path, module, "attention", width, width, kind, layout.block_of(path))
        cores.setdefault(kind, []).append(site)
    return cores


def _widths(host: Host, role: str) -> dict[str, int]:
    """Features of the role in each attention module."""
    if not any(role in roles for roles in host.layout.roles.values()):
        return {}
    sites, _ = find_sites(host.model, host.layout, role)
    return {site.path.rpartition(".")[0]: site.d_out for site in sites}


def takes(model: nn.Module, word: str) -> bool:
    """Whether the model, no encoder-decoder, takes this argument."""
    alone = not cast(PreTrainedModel, model).config.is_encoder_decoder
    return alone and word in inspect.signature(model.forward).parameters


def first_position(host: Host) -> int:
    """The position of a row's first token: RoBERTa's follow that of the padding."""
    tables = [host.model.get_submodule(p) for p, r in host.layout.names.items() if r == "position"]
    pads = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
    return next((pad + 1 for pad in pads if pad is not None), 0)
