"""Trained tokens: what the methods that lay tokens of their own into a row have in common.

A laid token is an id past the vocabulary. At the model (an encoder-decoder's encoder) a
`LaidTokens` writes such ids into the rows; at the embedding table a `PromptDelta` gives them rows
of its own. So models that look at their ids (to pool the last token that is no padding, to count
positions) see tokens like any others, scaled embeddings need no care, and callers get logits of
their own length.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from peftcli.core.delta import Delta
from peftcli.core.graft import deltas_of
from peftcli.core.layer import Layer
from peftcli.core.site import Site, path_of
from peftcli.errors import ConfigError, NotApplicable
from peftcli.kernels.precision import own_dtype

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class PromptDelta(Delta):
    """At the embedding table: the ids first ... first + P - 1 are the rows E (P, d)."""

    def __init__(self, E: Tensor, first: int, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.P = first, len(E)
        self.E = nn.Parameter(E)  # (P, d)
        self.encoder = encoder

    def rows(self) -> Tensor:
        """What stands at the laid ids, (P, d): E, or what the encoder makes of it, in its own
        type, so that the folded rows are those that were trained.
        """
        if self.encoder is None:
            return self.E
        with own_dtype(self.E):
            return self.encoder(self.E)

    @torch.no_grad()
    def fold(self) -> None:
        """Keep what the encoder makes of E in place of both."""
        self.E = nn.Parameter(self.rows().clone())
        self.encoder = None

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """The table's rows, and the prompt's at its own ids."""
        index = x - self.first
        mine = (index >= 0) & (index < self.P)
        y = layer(x.masked_fill(mine, 0))
        laid = F.embedding(index.clamp(0, self.P - 1), self.rows())
        return torch.where(mine[..., None], laid.to(y.dtype), y)


class LaidTokens(Delta):
    """At the model: x' = [first ... ; x], with the mask, the types, the positions and the labels
    that belong to it.

    `front` tokens stand before a row's tokens and `behind` after them. With `inside`, they stand
    between its first token and its last ([CLS] and [SEP] of an encoder). `fixed` are ids of the
    vocabulary by their places among the laid tokens; the others are first, first + 1, ...
    """

    ids: Tensor

    def __init__(
        self,
        first: int,
        front: int,
        behind: int = 0,
        inside: bool = False,
        fixed: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.front, self.behind, self.inside = front, behind, inside
        self.takes_positions = front + behind
        fixed, free = fixed or {}, itertools.count(first)
        ids = [fixed[i] if i in fixed else next(free) for i in range(front + behind)]
        self.register_buffer("ids", torch.tensor(ids), persistent=bool(fixed))  # (P,)

    def columns(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Where each token (B, T) of the rows stands in the laid rows."""
        column = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        moved = column + self.front * (column >= self.inside)
        if not self.behind:
            return moved
        ends = ids.new_full((len(ids),), ids.shape[1]) if mask is None else mask.sum(1)
        return moved + self.behind * (column >= ends[:, None] - int(self.inside))

    def lay(self, ids: Tensor, columns: Tensor) -> Tensor:
        """The ids (B, P + T), the laid ones in their order."""
        rows = self._spread(ids, columns, -1)
        free = rows < 0
        return torch.where(free, self.ids[free.cumsum(1) - 1], rows)

    def _spread(self, x: Tensor, columns: Tensor, fill: int) -> Tensor:
        """x (B, T) at its columns of (B, P + T), `fill` elsewhere."""
        wide = x.new_full((x.shape[0], x.shape[1] + self.front + self.behind), fill)
        return wide.scatter(1, columns, x)

    def forward(self, x: dict[str, Any], layer: Layer) -> Any:
        """The model on the laid rows; logits of tokens are those of the caller's own."""
        if _seen(x):
            return layer(self._decoding(x))
        ids, mask = x.get("input_ids"), x.get("attention_mask")
        if ids is None:
            raise ValueError("a prompt is laid between ids; the model was called with embeddings")
        narrow = mask is not None and mask.shape[-1] == ids.shape[1]
        columns = self.columns(ids, mask if narrow else None)
        new = {**x, "input_ids": self.lay(ids, columns)}
        for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("labels", -100)):
            value = x.get(name)
            if value is not None and value.shape == ids.shape:
                new[name] = self._spread(value, columns, fill)
        if x.get("position_ids") is not None:  # counted anew, as `generate` counts them
            held = new.get("attention_mask")
            new["position_ids"] = None if held is None else (held.long().cumsum(1) - 1).clamp_min(0)
        keep = x.get("logits_to_keep")
        if isinstance(keep, Tensor):
            new["logits_to_keep"] = columns[0, keep]
        out = layer(new)
        logits = getattr(out, "logits", None)
        if logits is not None and logits.shape[:2] == new["input_ids"].shape:
            out.logits = logits.take_along_dim(columns[..., None], 1)
        return out

    def _decoding(self, x: dict[str, Any]) -> dict[str, Any]:
        """A later step of a generation: the laid tokens are in the cache."""
        mask, positions = x.get("attention_mask"), x.get("position_ids")
        P = self.front + self.behind
        new = dict(x)
        if mask is not None:
            new["attention_mask"] = F.pad(mask, (self.front, self.behind), value=1)
        if positions is not None:
            new["position_ids"] = positions + P
        return new


class WideMask(Delta):
    """At an encoder-decoder: cross-attention sees P more states of the encoder."""

    def __init__(self, P: int) -> None:
        super().__init__()
        self.P = P

    def forward(self, x: dict[str, Any], layer: Layer) -> Any:
        """The model with P more columns in the encoder's mask."""
        mask = x.get("attention_mask")
        return layer(
            x if mask is None else {**x, "attention_mask": F.pad(mask, (self.P, 0), value=1)}
        )


def _seen(x: dict[str, Any]) -> bool:
    cache = x.get("past_key_values")
    return cache is not None and int(cache.get_seq_length()) > 0


def is_encoder(model: nn.Module) -> bool:
    """Whether the model is an encoder alone, whose heads read its first token."""
    config = cast(Any, model).config
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not config.is_encoder_decoder and not getattr(config, "is_decoder", False)


def table_of(host: Host) -> Site:
    """The embedding table that a prompt stands in. Raises `NotApplicable` for models without."""
    model = cast(Any, host.model)
    stack = model.get_encoder() if model.config.is_encoder_decoder else model
    table = stack.get_input_embeddings()
    if not isinstance(table, nn.Embedding):
        raise NotApplicable(
            f"{type(model).__name__} looks up no tokens: prompts need a model of text; prefixes "
            "(method=prefix_tuning) work on images too."
        )
    path = path_of(model, table)
    return Site(path, table, "embedding", table.num_embeddings, table.embedding_dim, "embed")


def first_free(table: Site) -> int:
    """The first id past the vocabulary that no other prompt has taken."""
    held = [d for d in deltas_of(table.module).values() if isinstance(d, PromptDelta)]
    return max([table.d_in, *(delta.first + delta.P for delta in held)])


def lay(host: Host, table: Site, delta: PromptDelta, front: int, behind: int = 0) -> None:
    """Put the prompt in: on the table, and at the model or the encoder that reads it."""
    model = cast(Any, host.model)
    two = model.config.is_encoder_decoder
    host.graft(table, delta)
    stack = model.get_encoder() if two else model
    path = path_of(model, stack)
    laid = LaidTokens(delta.first, front, behind, is_encoder(model))
    host.graft(Site(path, stack, "model", table.d_out, table.d_out), laid)
    if two:
        host.graft(Site("", model, "model", table.d_out, table.d_out), WideMask(front + behind))
    host.matched[host.building] = {"prompt": 1}


def ids_of(data: Calibration, text: str, P: int) -> Tensor:
    """The first `P` ids of the text, without special tokens; a shorter text is repeated.

    Raises `ConfigError` where there is no text, or nothing that reads it.
    """
    if data.tokenizer is None:
        raise ConfigError("method.init_text needs a task on text; this one has no tokenizer.")
    ids = data.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"method.init_text={text!r} has no tokens; this init needs a text.")
    return torch.tensor(ids * -(-P // len(ids)))[:P]


def prompt_of(host: Host, name: str) -> PromptDelta:
    """The prompt of an adapter."""
    return next(delta for _, delta in host.deltas(name) if isinstance(delta, PromptDelta))


def refuses_prompt(host: Host) -> str | None:
    """Why peft computes a prompt on this model differently, or None."""
    if cast(Any, host.model).can_generate():
        return None
    return "peft lays the prompt before the token that a head reads"


def sizes(host: Host, name: str) -> dict[str, Any]:
    """peft's description of a prompt on the model's only, or first, stack."""
    config = cast(Any, host.model).config.get_text_config()
    P, d = prompt_of(host, name).rows().shape
    return {
        "num_virtual_tokens": P,
        "token_dim": d,
        "num_transformer_submodules": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_layers": config.num_hidden_layers,
    }


def acting_rows(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft's tensors without the rows of a second stack, which never act."""
    P = config["num_virtual_tokens"]
    return {k: t[:P] if k == "prompt_embeddings" else t for k, t in tensors.items()}


def refuse_heads(config: Mapping[str, Any]) -> None:
    """Raises ValueError where peft's prompt moves the token that a head reads."""
    if config.get("task_type") not in ("CAUSAL_LM", "SEQ_2_SEQ_LM", None):
        raise ValueError(
            f"a prompt of task_type={config['task_type']} has its head read a row of the prompt; "
            "only CAUSAL_LM and SEQ_2_SEQ_LM mean the same here."
        )
