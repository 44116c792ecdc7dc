"""Partial fine-tuning: named modules of the base train, all else rests.

    theta' = theta - lr * update        for theta of the chosen modules

The last block, embeddings and head: "Exploring and Evaluating Personalized Models for Code
Generation", Zlotchevski et al., ESEC/FSE 2022, arXiv 2208.13928. Norms alone: "Tuning LayerNorm in
Attention: Towards Efficient Multi-Modal LLM Finetuning", Zhao et al., 2023, arXiv 2312.11420. What
lies below the lowest chosen block needs no backward pass, and its activations are not kept; where
the data are few, its features may be (`cache_frozen_prefix`), so that it runs once an example.

There is no official code: presets are ours. `last_layer` is the last block of the decoder where
there are two stacks. Heads that share their weight with the embeddings train it in both places,
unless `untie` gives the head its own. Norms travel in Hugging Face peft's LN tuning format, rows of
the token table in that of its trainable tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

from annotated_types import Ge
from torch import Tensor, nn
from transformers import PreTrainedModel

from peftcli.core.method import Method
from peftcli.core.site import expression, path_of
from peftcli.errors import ConfigError, NotApplicable, nearest
from peftcli.export.hf_peft import target_names
from peftcli.methods.frozen_prefix import cache_prefix
from peftcli.methods.selection import base_names, inside
from peftcli.methods.token_rows import TokenRows, train_rows
from peftcli.models.roles import outside_role

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

QK_NORM = re.compile(r"(.*\.)?[qk]_(layer)?norm")


# -- presets: paths of modules ---------------------------------------------------------------------
def _last_layer(method: Partial, host: Host) -> list[str]:
    """The last blocks of the decoder, else of the text model, else of the only stack."""
    towers = host.layout.towers
    tower = next((t for t in ("decoder", "text") if t in towers), towers[-1])
    stack = [path for path, t in zip(host.layout.blocks, towers, strict=True) if t == tower]
    if method.n_last > len(stack):
        raise ConfigError(
            f"method.n_last={method.n_last}: {type(host.model).__name__} has {len(stack)} blocks."
        )
    return stack[-method.n_last :]


def _embed_head(method: Partial, host: Host) -> list[str]:
    model = cast(PreTrainedModel, host.model)
    return [path_of(model, model.get_input_embeddings()), *_head(method, host)]


def _head(method: Partial, host: Host) -> list[str]:
    """The output embeddings of a language model, else the classifier."""
    head = cast(PreTrainedModel, host.model).get_output_embeddings()
    if head is not None:
        return [path_of(host.model, head)]
    return [p for p, role in host.layout.names.items() if role == "classifier"]


def _layernorm(method: Partial, host: Host) -> list[str]:
    norms = [p for p, role in host.layout.names.items() if role == "norm"]
    return [p for p in norms if method.include_qk_norm or not QK_NORM.fullmatch(p)]


def _attention(method: Partial, host: Host) -> list[str]:
    roles = ("q", "k", "v", "o", "qkv", "pos_q", "pos_k")
    return [p for p, role in host.layout.names.items() if role in roles]


PRESETS: dict[str, Callable[[Partial, Host], list[str]]] = {
    "last_layer": _last_layer,
    "embed_head": _embed_head,
    "layernorm": _layernorm,
    "head": _head,
    "attention": _attention,
}


@dataclass(frozen=True)
class Partial(Method):
    """Some modules of the base train whole, or some rows of its token table."""

    family: ClassVar[str] = "selective"
    size_option: ClassVar[str | None] = "n_last"
    peft_type: ClassVar[str | None] = "LN_TUNING"
    also_reads: ClassVar[tuple[str, ...]] = ("TRAINABLE_TOKENS",)
    hf_harmless: ClassVar[frozenset[str]] = frozenset({"token_indices", "init_weights"})
    on_quantised: ClassVar[bool] = False

    preset: Literal["last_layer", "embed_head", "layernorm", "head", "attention", "custom"] = (
        "last_layer"
    )
    modules: tuple[str, ...] = ()
    n_last: Annotated[int, Ge(1)] = 1
    train_biases: bool = True
    include_qk_norm: bool = False
    untie: bool = False
    token_ids: tuple[Annotated[int, Ge(0)], ...] = ()
    cache_frozen_prefix: bool = False

    @property
    def packs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Features are kept by example, not by packed row."""
        return not self.cache_frozen_prefix

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Select the modules' parameters, or graft the chosen rows of the token table."""
        if self.token_ids:
            self._refuse_beside_rows()
            train_rows(host, self.token_ids)
            return
        chosen = self.names(host)
        if not chosen:
            raise NotApplicable(
                f"{type(host.model).__name__} has nothing of method.preset={self.preset}: take "
                "another, or name parameters in method.modules."
            )
        head = cast(PreTrainedModel, host.model).get_output_embeddings()
        if self.untie and head is not None:
            _untie(host, head)
            chosen = self.names(host)
        first = base_names(host)
        tied = {f"{n} (tied to {first[n]})": 1 for n in chosen if n != first[n]}
        what = "modules" if self.modules else self.preset
        names = dict.fromkeys(first[n] for n in chosen)
        host.matched[host.building] = {what: len(names), **tied}
        host.select(names)
        if self.cache_frozen_prefix:
            cache_prefix(host, data)

    def published(self, host: Host, name: str) -> Method:
        """What is read back needs no features."""
        return replace(self, cache_frozen_prefix=False)

    def names(self, host: Host) -> list[str]:
        """The parameters that train, tied ones under each of their names."""
        every = list(base_names(host))
        if self.modules:
            names = [n for pattern in self.modules for n in _matches(host, pattern, every)]
        elif self.preset == "custom":
            raise ConfigError(
                "method.preset=custom: name the parameters in method.modules, as regular "
                "expressions for their whole names."
            )
        else:
            names = inside(every, PRESETS[self.preset](self, host))
        return [n for n in names if self.train_biases or not n.endswith(".bias")]

    def _refuse_beside_rows(self) -> None:
        if self.cache_frozen_prefix:
            raise ConfigError("method.token_ids train below all blocks: no features to keep.")
        if self.preset != "embed_head" or self.modules:
            raise ConfigError(
                "method.token_ids are rows of the token embeddings: they go with "
                "method.preset=embed_head and no method.modules."
            )

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """peft's LN tuning holds norms alone, its trainable tokens rows of one stack's table."""
        if self.token_ids:
            if cast(PreTrainedModel, host.model).config.is_encoder_decoder:
                return "peft's trainable tokens are not those of both stacks"
            return "peft's trainable tokens save no head" if host.saved_modules else None
        norms = all(host.layout.role_of(path) == "norm" for path in self._paths(host))
        return None if norms else "peft has a format for norms only"

    def _paths(self, host: Host) -> list[str]:
        return list(dict.fromkeys(n.rpartition(".")[0] for n in self.names(host)))

    def hf_tensors(self, host: Host, name: str) -> dict[str, Tensor]:
        """The rows; or weight and bias of every norm that has one that trains."""
        if self.token_ids:
            site, delta = next(host.deltas(name))
            return {f"{site.path}.trainable_tokens_delta": cast(TokenRows, delta).rows.detach()}
        names = inside(base_names(host), self._paths(host))
        split = [n.rpartition(".") for n in names]
        return {
            f"{path}.ln_tuning_layers.{leaf}": host.model.get_parameter(f"{path}.{leaf}").detach()
            for path, _, leaf in split
        }

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """The table's name and its rows, or the norms' names."""
        if self.token_ids:
            path = next(host.deltas(name))[0].path
            names = {"target_modules": target_names(host.model, {path})}
            return {"peft_type": "TRAINABLE_TOKENS", "token_indices": list(self.token_ids), **names}
        return {"target_modules": target_names(host.model, set(self._paths(host)))}

    @classmethod
    def hf_acting(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Without the rows of a tied head, which peft writes a second time."""
        if config["peft_type"] != "TRAINABLE_TOKENS":
            return tensors
        is_row = re.compile(r".*\.trainable_tokens_delta")
        return {
            k: t
            for k, t in tensors.items()
            if not is_row.fullmatch(k) or outside_role(k) == "embed"
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """peft's tokens, or its names of modules as expressions for the names of their parameters.
        Raises ValueError for rows of what is no token table.
        """
        targets = config["target_modules"]
        if config["peft_type"] == "TRAINABLE_TOKENS":
            names = [targets] if isinstance(targets, str) else targets
            if [outside_role(name) for name in names] != ["embed"]:
                raise ValueError(f"target_modules={targets} is no token table.")
            return {"preset": "embed_head", "token_ids": tuple(config["token_indices"])}
        if isinstance(targets, str):
            return {"preset": "custom", "modules": (rf"({targets})\.[^.]+",)}
        patterns = tuple(rf"(.*\.)?{re.escape(target)}\.[^.]+" for target in targets)
        return {"preset": "custom", "modules": patterns}


def _matches(host: Host, pattern: str, names: list[str]) -> list[str]:
    wanted = expression("method.modules", pattern)
    found = [n for n in names if wanted.fullmatch(n)]
    if not found:
        near = nearest(pattern, names)
        raise ConfigError(
            f"method.modules: {pattern!r} matches the whole name of no parameter of "
            f"{type(host.model).__name__}." + (f" Nearest: {', '.join(near)}." if near else "")
        )
    return found


def _untie(host: Host, head: nn.Module) -> None:
    """Give the head a weight of its own, equal to the embeddings'."""
    head.weight = nn.Parameter(cast(Tensor, head.weight).detach().clone(), requires_grad=False)
    cast(Any, host.model).config.tie_word_embeddings = False
