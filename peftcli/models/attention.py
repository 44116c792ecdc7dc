"""Attention through transformers' registry: packed rows, one sdpa call a segment and no mask of the
whole row, and prefixes, trained keys and values that every token sees.

A row is a sequence of segments. A segment sees itself, causally, and before that the whole of its
prefix: another segment, which several may share (a system prompt, or the prompt of several
answers). Boundaries travel as the keyword `segments` from the model's call to every attention
layer.

A prefix is a delta on the attention module; the registered function reads it there, behind the
cache, so it is never cached. Each segment sees it; no mask hides it and no position bias is added
to it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peftcli.core.delta import Delta
from peftcli.core.graft import active_of, deltas_of
from peftcli.core.layer import Layer
from peftcli.kernels.batched_attention import is_one_by_one, one_by_one
from peftcli.kernels.dense_attention import dense_attention, is_dense
from peftcli.kernels.packed_attention import Segment, Segments, behind_prefix, packed_attention

NAME = "peftcli_packed"
KeysValues = tuple[Tensor, Tensor]


class KeyValueDelta(Delta):
    """Keys and values that an attention module sees before those of the tokens; the module's own
    forward is left alone.
    """

    def forward(self, x: Any, layer: Layer) -> Any:
        """layer(x): the attention function reads `keys_values` on its own."""
        return layer(x)

    def keys_values(self, B: int) -> KeysValues:
        """K and V for a batch of `B` rows, each (B, P, G * D), all key heads side by side."""
        raise NotImplementedError


def prefixes(module: nn.Module, key: Tensor) -> KeysValues | None:
    """Keys and values (B, G, P, D) of the active prefixes of an attention module, in the heads and
    the type of `key` (B, G, T, D); None without any.
    """
    if not active_of(module):
        return None
    deltas = deltas_of(module)
    mine = [deltas[name] for name in active_of(module)]
    B, G, _, D = key.shape
    made = [delta.keys_values(B) for delta in mine if isinstance(delta, KeyValueDelta)]
    if not made:
        return None
    keys, values = (torch.cat(parts, 1).to(key.dtype) for parts in zip(*made, strict=True))
    return keys.view(B, -1, G, D).transpose(1, 2), values.view(B, -1, G, D).transpose(1, 2)


def packed_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed row (1, H, T, D) -> (1, T, H, D); without `segments` that of a
    batch.
    """
    prefix = prefixes(module, key)
    if segments is None:
        stock = {"scaling": scaling, "dropout": dropout, **kwargs}
        if prefix is not None:
            return behind(prefix, module, query, key, value, attention_mask, **stock)
        return of_batch(module, query, key, value, attention_mask, **stock)
    assert query.shape[0] == 1, "a packed row stands alone"
    assert query.shape[2] == key.shape[2], "a packed row has no cache"
    assert attention_mask is None, "a packed row takes no mask"
    if kwargs.get("softcap") or kwargs.get("position_bias") is not None:
        raise ValueError("packed rows have no softcap and no position bias")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return packed_attention(query, key, value, segments, scale, dropout, prefix), None


def behind(
    prefix: KeysValues,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a batch (B, H, T, D) that sees the prefix first.

    Without a mask sdpa would take the first T keys for those of the T queries: causality is written
    into a mask here, and the empty slots of a static cache are cut off.
    """
    T, P = query.shape[2], prefix[0].shape[2]
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if is_causal and attention_mask is None and T > 1:
        key, value = key[:, :, :T], value[:, :, :T]
        position_bias = None if position_bias is None else position_bias[..., :T]
        attention_mask = behind_prefix(P, T, query.device)
    elif attention_mask is not None:
        seen = True if attention_mask.dtype == torch.bool else 0.0
        attention_mask = F.pad(attention_mask, (P, 0), value=seen)
    if position_bias is not None:
        position_bias = F.pad(position_bias, (P, 0))
    key, value = torch.cat([prefix[0], key], 2), torch.cat([prefix[1], value], 2)
    bias = {} if position_bias is None else {"position_bias": position_bias}
    return of_batch(module, query, key, value, attention_mask, is_causal=False, **bias, **kwargs)


def of_batch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a batch (B, H, T, D) -> (B, T, H, D): dense products where they are faster and
    can do what is asked for, else transformers' sdpa.
    """
    T, mask = query.shape[2], attention_mask
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    is_causal = is_causal and mask is None and T > 1
    added = [t for t in (mask, position_bias) if t is not None]
    special = any(t.requires_grad or t.ndim != 4 for t in added) or any(
        kwargs.get(name) is not None for name in ("softcap", "cache")
    )
    is_plain = T == 1 or special or is_one_by_one()
    if is_plain or not is_dense(query, dropout, is_causal):
        bias = {} if position_bias is None else {"position_bias": position_bias}
        options = {"is_causal": is_causal, "scaling": scaling, "dropout": dropout, **bias, **kwargs}
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    if is_causal:  # the others are empty slots of a static cache
        key, value = key[:, :, :T], value[:, :, :T]
        position_bias = None if position_bias is None else position_bias[..., :T]
    if position_bias is not None:
        if mask is None:
            mask = position_bias
        elif mask.dtype == torch.bool:
            mask = torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
        else:
            mask = mask + position_bias
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return dense_attention(query, key, value, scale, mask, is_causal, dropout), None


def packed_mask(
    *args: Any, attention_mask: Tensor | None = None, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """No mask for rows without padding: plain ones run causally, packed ones segment by segment.
    Else transformers' own.
    """
    if attention_mask is None and local_size is None and kwargs["q_length"] == kwargs["kv_length"]:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, local_size=local_size, **kwargs)


# Both: a name without a mask function gets no mask at all, and padding is ignored silently.
AttentionInterface.register(NAME, packed_rows)
AttentionMaskInterface.register(NAME, packed_mask)


def use_packed_attention(model: nn.Module) -> None:
    """Send every attention layer of the model through the registry; copies of the config too (T5
    has three). Models whose attention is no sdpa are left alone.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = NAME


def keep_uncompiled() -> None:
    """Leave the registered function out of what `torch.compile` captures."""
    AttentionInterface.register(NAME, torch.compiler.disable(packed_rows))


def is_registered(model: nn.Module) -> bool:
    """Whether the model's attention asks the registry, with sdpa underneath."""
    config: Any = model.config
    asks = isinstance(model, PreTrainedModel) and model._can_set_attn_implementation()
    return asks and getattr(config, "_attn_implementation", None) in ("sdpa", NAME)


@torch.no_grad()
def can_pack(model: nn.Module, max_length: int) -> str | None:
    """Why packed rows would be wrong for this model, or None where they give the logits of the rows
    apart.

    Tried on the model itself: two short rows, apart and packed. The attention must go through the
    registry.
    """
    config = model.config
    window = getattr(config, "sliding_window", None)
    if window and window < max_length and getattr(config, "use_sliding_window", True):
        return f"its attention window of {window} is shorter than dataset.max_length={max_length}"
    if getattr(config, "_attn_implementation", None) != NAME:
        return "its attention does not go through sdpa"
    was_training = model.training
    model.eval()
    try:
        with one_by_one():
            return _probe(model)
    finally:
        model.train(was_training)


def _probe(model: Any) -> str | None:
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(9, device=device)[None] % model.config.get_text_config().vocab_size
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]], device=device)
    call = {
        "position_ids": position,
        "segments": (Segment(0, 4), Segment(4, 9)),
        "use_cache": False,
    }
    try:
        packed = model(input_ids=ids, **call).logits
    except (TypeError, ValueError, RuntimeError, AssertionError) as e:
        return f"its forward refuses packed rows ({type(e).__name__})"
    apart = torch.cat(
        [model(input_ids=part, use_cache=False).logits for part in ids.split([4, 5], 1)], 1
    )
    error = (packed - apart).abs().max() / apart.abs().max().clamp_min(1e-6)
    tolerance = 5e-2 if packed.dtype == torch.bfloat16 else 1e-4
    return None if error <= tolerance else f"packed rows change its logits by {error:.1e}"
