"""P-tuning. v1: GPT Understands, Too. Liu et al. 2021, arXiv 2103.10385. v2: P-Tuning v2: Prompt
Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks. Liu et al., ACL 2022,
arXiv 2110.07602.

    v1:  rows = F(E),  F = MLP(BiLSTM(.))       E (P, d): trained tokens in a template around x
    v2:  softmax(Q [K_p; K]') [V_p; V]          a table (P, L * 2 G D) of keys and values

v1 makes the tokens of a prompt depend on one another through a small encoder F, folded at the end.
v2 is prefix tuning without the map (lr about 5e-3 to 1e-2), dropout on keys and values, and a plain
classifier, which trains as fresh heads always do; its dropout acts in training alone.

A `template` (a, b, c) of v1 counts the trained tokens before the mask, between mask and subject,
and behind the subject: [CLS] a [MASK] b x c [SEP], with a stop where c is 0. With a word for each
class (`label_words`) an encoder answers by the word that its pretrained head puts at the mask
(`cloze.py`), the paper's way; else a classifier reads [CLS], and no [MASK] is laid. A decoder has
(a, b, 0): a before x and b behind it, where its classifier reads the last; in a language model they
would stand between prompt and answer, which a row does not tell apart, so there all are in front,
(a, 0, 0), as in Hugging Face peft.
A trained token is an id past the vocabulary (`prompt.py`), where the code has [UNK] under it.
`mlp` is peft's encoder of three linears. In the paper's few-shot runs the backbone trains too, at a
rate of its own (`tune_backbone`); its runs on facts (LAMA) decay Adam's 1e-5 by 0.98 an epoch,
which is left to `scheduler`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from peftcli.core.graft import is_own
from peftcli.core.method import Method
from peftcli.errors import ConfigError
from peftcli.methods import cloze, prompt
from peftcli.methods.prefix import fold_prefixes
from peftcli.methods.prefix_tuning import PrefixTuning
from peftcli.methods.prompt import PromptDelta

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class LSTMEncoder(nn.Module):
    """W2 relu(W1 h + b1) + b2 with h = BiLSTM(E) (P, 2h)."""

    def __init__(self, d: int, h: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(d, h, layers, dropout=dropout, bidirectional=True)
        self.mlp = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))

    def forward(self, E: Tensor) -> Tensor:
        """(P, d) -> (P, d)."""
        return self.mlp(self.lstm(E)[0])


class MLPEncoder(nn.Sequential):
    """Three linears of width h."""

    def __init__(self, d: int, h: int) -> None:
        linears = nn.Linear(d, h), nn.Linear(h, h), nn.Linear(h, d)
        super().__init__(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])


@dataclass(frozen=True)
class PTuning(Method):
    """Trained tokens in a template (v1), or keys and values in every layer (v2)."""

    family: ClassVar[str] = "prompt"
    size_option: ClassVar[str | None] = "pre_seq_len"
    starts_at_base: ClassVar[bool] = False
    peft_type: ClassVar[str | None] = "P_TUNING"  # of v1; what v2 trains is peft's PREFIX_TUNING
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        "num_virtual_tokens token_dim num_layers num_attention_heads num_transformer_submodules"
        " encoder_reparameterization_type encoder_hidden_size encoder_num_layers"
        " encoder_dropout".split()
    )

    variant: Literal["v1", "v2"] = "v2"
    template: tuple[Annotated[int, Ge(0)], Annotated[int, Ge(0)], Annotated[int, Ge(0)]] = (3, 3, 3)
    label_words: dict[str, str] = field(default_factory=dict)
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    encoder_hidden_size: Annotated[int, Ge(1)] | None = None
    encoder_layers: Annotated[int, Ge(1)] = 2
    encoder_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    tune_backbone: bool = False
    backbone_lr: Annotated[float, Gt(0)] = 1e-5
    pre_seq_len: Annotated[int, Ge(1)] = 4
    prefix_projection: bool = False
    prefix_hidden_size: Annotated[int, Ge(1)] = 512
    hidden_dropout: Annotated[float, Ge(0), Lt(1)] = 0.1

    @property
    def lays_tokens(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Only v1 lays tokens into a row."""
        return self.variant == "v1"

    @property
    def fills_mask(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """With words for the classes."""
        return bool(self.label_words)

    def __post_init__(self) -> None:
        """Refuse words where no mask is laid."""
        if self.label_words and self.variant == "v2":
            raise ConfigError("method.label_words go with method.variant=v1: v2 lays no mask.")

    @property
    def prefix(self) -> PrefixTuning:
        """The prefix tuning that v2 is."""
        return PrefixTuning(
            prefix_length=self.pre_seq_len,
            prefix_projection=self.prefix_projection,
            mid_dim=self.prefix_hidden_size,
            prefix_dropout=self.hidden_dropout,
        )

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """The template around each row, or the prefix of each layer; the backbone, if it trains."""
        if self.variant == "v2":
            self.prefix.setup(host)
        else:
            self._lay(host, data)
        if self.tune_backbone:
            host.select(n for n, _ in host.model.named_parameters() if not is_own(n))

    def _lay(self, host: Host, data: Calibration | None) -> None:
        """The template around each row, with its mask where words answer."""
        table = prompt.table_of(host)
        words = cloze.words_of(data, self.label_words) if self.label_words else None
        front, behind = self._places(host.model)
        E = torch.randn(front + behind, table.d_out)
        delta = PromptDelta(E, prompt.first_free(table), self._encoder(table.d_out))
        if words:
            cloze.lay(host, table, delta, self.template, words)
        else:
            prompt.lay(host, table, delta, front, behind)

    def _places(self, model: nn.Module) -> tuple[int, int]:
        """Trained tokens before a row's own and behind them. Raises `ConfigError` for a template
        that the model's task has no place for.
        """
        a, b, c = self.template
        if prompt.is_encoder(model) and a + b + c:
            return a + b, c
        language = cast(Any, model).can_generate()
        if a + b == 0 or c or (language and b):
            fits = f"[{a + b + c or 9}, 0, 0]"
            raise ConfigError(
                f"method.template={[a, b, c]} does not fit {type(model).__name__}: "
                f"{'all tokens stand in front' if language else 'none stands third'}. Take "
                f"method.template={fits}."
            )
        return a, b

    def _encoder(self, d: int) -> nn.Module | None:
        if self.encoder == "none":
            return None
        if self.encoder == "mlp":
            return MLPEncoder(d, self.encoder_hidden_size or d)
        h = self.encoder_hidden_size or d // 2
        return LSTMEncoder(d, h, self.encoder_layers, self.encoder_dropout)

    def param_groups(self, host: Host, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """A backbone that trains has a rate of its own; heads have the prompt's."""
        groups = super().param_groups(host, lr, weight_decay)
        if not self.tune_backbone:
            return groups
        heads = tuple(f"{path}." for path in host.saved_modules)
        trained = host.trained()
        slow = {trained[n] for n in host.selected if n in trained and not n.startswith(heads)}
        split = []
        for group in groups:
            for rate, backbone in ((lr, False), (self.backbone_lr, True)):
                mine = [p for p in group["params"] if (p in slow) == backbone]
                split.append({**group, "params": mine, "lr": rate})
        return [g for g in split if g["params"]]

    def finish(self, host: Host) -> None:
        """Fold the encoder, or the map."""
        for name in [name for name, method in host.adapters.items() if method is self]:
            if self.variant == "v2":
                fold_prefixes(host, name)
            else:
                prompt.prompt_of(host, name).fold()

    def published(self, host: Host, name: str) -> Method:
        """Without encoder or map once they are folded."""
        if self.variant == "v2":
            held = cast(PrefixTuning, self.prefix.published(host, name))
            return replace(self, prefix_projection=held.prefix_projection)
        folded = prompt.prompt_of(host, name).encoder is None
        return replace(self, encoder="none" if folded else self.encoder)

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """peft has v1 with all tokens in front, and v2 as a prefix."""
        if self.tune_backbone:
            return "the backbone trained too"
        return (
            self.prefix.hf_refuses(host, name)
            if self.variant == "v2"
            else prompt.refuses_prompt(host)
        )

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """Sizes; v2's file is one of PREFIX_TUNING."""
        if self.variant == "v2":
            held = self.prefix.hf_config(host, name)
            return {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": self.pre_seq_len, **held}
        return {
            **prompt.sizes(host, name),
            "encoder_reparameterization_type": "LSTM" if self.encoder == "lstm" else "MLP",
            "encoder_hidden_size": self.encoder_hidden_size,
            "encoder_num_layers": self.encoder_layers,
            "encoder_dropout": self.encoder_dropout,
        }

    def hf_tensors(self, host: Host, name: str) -> dict[str, Tensor]:
        """The folded rows (P, d), or the table (P, L * 2 G D)."""
        if self.variant == "v2":
            return self.prefix.hf_tensors(host, name)
        return {"prompt_embeddings": prompt.prompt_of(host, name).rows().detach()}

    @classmethod
    def hf_acting(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Without the rows of a decoder, which peft allocates and never uses."""
        return prompt.acting_rows(config, tensors)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """A file holds folded rows, all in front. Raises ValueError for heads that read one."""
        prompt.refuse_heads(config)
        return {
            "variant": "v1",
            "encoder": "none",
            "template": (config["num_virtual_tokens"], 0, 0),
        }
