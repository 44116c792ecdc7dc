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

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from annotated_types import Ge, Lt
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcli.core.method import Method
from peftcli.errors import ConfigError
from peftcli.methods.prefix import (
    PositionShift,
    PrefixDelta,
    PrefixEncoder,
    find_cores,
    first_position,
    fold_prefixes,
    prefixes_of,
    takes,
)
from peftcli.methods.prompt import ids_of
from peftcli.models.attention import use_packed_attention

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

FIT_STEPS, FIT_LR = 500, 1e-4  # of Adam, as in the paper's code


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
        cores = find_cores(host, self.leave_out)
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
        if self.position_offset == "prefix" and takes(host.model, "position_ids"):
            host.graft(host.places("model")[0], PositionShift(P, first_position(host)))
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
        if not takes(host.model, "position_ids"):
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
