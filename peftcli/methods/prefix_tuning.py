"""Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li and Liang, ACL 2021, arXiv
2101.00190.

    attention_l(x) = softmax(Q [K_p; K]' / sqrt(D) + mask) [V_p; V]      K_p, V_p (P, G D)
    [K_p | V_p] = H_l = B_l tanh(A E)    E (P, d), A (m, d), B_l (2 G D, m)
                  or  = W_l              W_l (P, 2 G D)

Every layer sees P trained keys and values (G key heads of size D) before those of the tokens: a
steering context that, unlike a text, reaches each layer directly. The map from E is there for
training alone: it makes W, which is hard to train itself, well conditioned, and is folded at the
end. Encoder-decoders have three independent prefixes: in the encoder's self-attention, and in the
decoder's self- and cross-attention.

The paper's B is the B_l of all layers in one matrix; here each layer holds its own, which is the
same function, the same start and the same count. Prefixes are no cache: gradient checkpointing,
packed rows (each example sees the prefix) and generation work. The keys are not rotated where the
model rotates its own. The paper's code counts the prefix in positions (`position_offset=prefix`:
tokens start at P, as in Hugging Face peft); with `zero` they start where they did. Models with
relative positions, and encoder-decoders, keep theirs. Zero keys and values are not the identity:
each takes a share exp(0) of the softmax.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcli.core.delta import Delta
from peftcli.core.layer import Layer
from peftcli.core.method import Method
from peftcli.core.site import Site, find_sites
from peftcli.errors import ConfigError, NotApplicable
from peftcli.methods.prompt import ids_of
from peftcli.models.attention import (
    KeysValues,
    KeyValueDelta,
    is_registered,
    use_packed_attention,
)
from peftcli.models.roles import is_cross

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

FIT_STEPS, FIT_LR = 500, 1e-4  # of Adam, as in the paper's code


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
        """[K_p | V_p] (P, 2 G D)."""
        if self.B is None:
            assert self.W is not None
            return self.W
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


@dataclass(frozen=True)
class PrefixTuning(Method):
    """P trained keys and values in front of every attention."""

    family: ClassVar[str] = "prompt"
    size_option: ClassVar[str | None] = "prefix_length"
    starts_at_base: ClassVar[bool] = False
    peft_type: ClassVar[str | None] = "PREFIX_TUNING"
    hf_fields: ClassVar[Mapping[str, str]] = {"prefix_length": "num_virtual_tokens"}
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        "token_dim num_layers num_attention_heads num_transformer_submodules encoder_hidden_size"
        " prefix_projection init_weights".split()
    )

    prefix_length: Annotated[int, Ge(1)] = 10
    prefix_projection: bool = True
    mid_dim: Annotated[int, Ge(1)] = 512
    prefix_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    init: Literal["normal", "zero", "activations"] = "normal"
    init_text: str = ""
    position_offset: Literal["prefix", "zero"] = "prefix"
    leave_out: tuple[Annotated[int, Ge(0)], ...] = ()

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """One prefix for each kind of attention, a delta on each attention module."""
        cores = _cores(host, self.leave_out)
        held = None
        if self.init == "activations" and data is not None:
            held = self._activations(host, data)
        use_packed_attention(host.model)
        P, d = self.prefix_length, cast(Any, host.model).config.get_text_config().hidden_size
        encoders: dict[str, PrefixEncoder] = {}
        if self.prefix_projection:
            encoders = {kind: PrefixEncoder(P, d, self.mid_dim) for kind in cores}
            host.share(nn.ModuleDict(encoders).to(next(iter(cores.values()))[0].device))
        for kind, sites in cores.items():
            for site in sites:
                encoder = encoders.get(kind)
                host.graft(site, PrefixDelta(P, site.d_in, encoder, self.prefix_dropout))
        if self.position_offset == "prefix" and _takes(host.model, "position_ids"):
            host.graft(host.places("model")[0], PositionShift(P, _first_position(host)))
        host.matched[host.building] = {kind: len(sites) for kind, sites in cores.items()}
        self._start(host, held)

    def _start(self, host: Host, held: list[Tensor] | None) -> None:
        """Values of the tables at the start, other than the default."""
        deltas = list(prefixes_of(host, host.building))
        if self.init == "zero":
            for delta in deltas:
                for tensor in (delta if delta.B is None else delta.B).parameters():
                    nn.init.zeros_(tensor)
        if held is not None and self.prefix_projection:
            _fit(host.shared(host.building), deltas, held)
        elif held is not None:
            for delta, table in zip(deltas, held, strict=True):
                cast(nn.Parameter, delta.W).data.copy_(table)

    @torch.no_grad()
    def _activations(self, host: Host, data: Calibration) -> list[Tensor]:
        """[K | V] (P, 2 G D) of every layer when the model reads `init_text`."""
        model = cast(Any, host.model)
        if model.config.is_encoder_decoder or not model.can_generate():
            raise ConfigError(
                f"method.init=activations reads the cache of a decoder; {type(model).__name__} is "
                "none. Take method.init=normal."
            )
        ids = ids_of(data, self.init_text, self.prefix_length).to(model.device)
        model.eval()
        cache = model(input_ids=ids[None], use_cache=True).past_key_values
        both = [(layer.keys, layer.values) for layer in cache.layers]  # (1, G, P, D) each
        return [torch.cat([t[0].transpose(0, 1).flatten(1) for t in kv], 1).float() for kv in both]

    def finish(self, host: Host) -> None:
        """Fold the map: what is kept are the tables."""
        for name, method in host.adapters.items():
            if method is self:
                fold_prefixes(host, name)

    def published(self, host: Host, name: str) -> Method:
        """Without the map once it is folded, and without a start."""
        folded = all(delta.B is None for delta in prefixes_of(host, name))
        projection = self.prefix_projection and not folded
        return replace(self, prefix_projection=projection, init="normal", init_text="")

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """peft has one prefix, in the self-attention of a single stack, and it moves positions."""
        if cast(PreTrainedModel, host.model).config.is_encoder_decoder:
            return "peft has one prefix for an encoder-decoder, not three"
        if not _takes(host.model, "position_ids"):
            return "peft's prefix is a cache, which this model does not take"
        if self.leave_out:
            return "peft's prefix is in every layer"
        return "peft counts the prefix in positions" if self.position_offset == "zero" else None

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """Sizes. The table is folded, so the file has no map."""
        deltas = list(prefixes_of(host, name))
        config = cast(Any, host.model).config.get_text_config()
        G = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        d_kv = deltas[0].table().shape[1] // 2
        return {
            "token_dim": d_kv,
            "num_layers": len(deltas),
            "num_attention_heads": G,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
        }

    def hf_tensors(self, host: Host, name: str) -> dict[str, Tensor]:
        """The tables of all layers side by side, (P, L * 2 G D): K_0, V_0, K_1, V_1, ..."""
        tables = [delta.table().detach() for delta in prefixes_of(host, name)]
        return {"prompt_embeddings": torch.cat(tables, 1)}

    def load_hf(self, host: Host, name: str, tensors: Mapping[str, Tensor]) -> None:
        """The table's columns go to their layers."""
        deltas = list(prefixes_of(host, name))
        parts = tensors["prompt_embeddings"].chunk(len(deltas), 1)
        for delta, table in zip(deltas, parts, strict=True):
            cast(nn.Parameter, delta.W).copy_(table)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """A file always holds the folded table. Raises ValueError for encoder-decoders."""
        if config.get("task_type") == "SEQ_2_SEQ_LM" or config["num_transformer_submodules"] == 2:
            raise ValueError("peft's prefix of an encoder-decoder skips every other pair of it.")
        return {"prefix_projection": False}


def prefixes_of(host: Host, name: str) -> Iterator[PrefixDelta]:
    """The prefixes of an adapter, layer by layer; an encoder's before its decoder's."""
    return (delta for _, delta in host.deltas(name) if isinstance(delta, PrefixDelta))


def fold_prefixes(host: Host, name: str) -> None:
    """Keep the tables of an adapter's prefixes and drop the map that made them."""
    for delta in prefixes_of(host, name):
        delta.fold()
    host.unshare(name)


def _fit(encoders: nn.Module, deltas: list[PrefixDelta], tables: list[Tensor]) -> None:
    """Bring the map to give these tables, by mean squared error."""
    parameters = [*encoders.parameters(), *(p for delta in deltas for p in delta.parameters())]
    optimizer = torch.optim.Adam(parameters, FIT_LR)
    goal = torch.cat(tables, 1)
    for _ in range(FIT_STEPS):
        optimizer.zero_grad()
        F.mse_loss(torch.cat([delta.table() for delta in deltas], 1), goal).backward()
        optimizer.step()
    optimizer.zero_grad()


def _cores(host: Host, leave_out: Sequence[int]) -> dict[str, list[Site]]:
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


def _takes(model: nn.Module, word: str) -> bool:
    """Whether the model, no encoder-decoder, takes this argument."""
    alone = not cast(PreTrainedModel, model).config.is_encoder_decoder
    return alone and word in inspect.signature(model.forward).parameters


def _first_position(host: Host) -> int:
    """The position of a row's first token: RoBERTa's follow that of the padding."""
    tables = [host.model.get_submodule(p) for p, r in host.layout.names.items() if r == "position"]
    pads = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
    return next((pad + 1 for pad in pads if pad is not None), 0)
