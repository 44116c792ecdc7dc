"""Classes as words at a mask: what a cloze template adds to a prompt on an encoder.

    [CLS] a tokens [MASK] b tokens x (c tokens, or a stop) [SEP]
    logit of a class = that of its word at [MASK], by the base's own masked-language head

Nothing fresh is trained: the head was pretrained to fill gaps, and the prompt asks it to. The head
sees the mask's hidden state alone, so it costs one token a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from peftcli.core.delta import Delta
from peftcli.core.layer import Layer
from peftcli.core.site import Site
from peftcli.errors import ConfigError, NotApplicable
from peftcli.methods.prompt import LaidTokens, PromptDelta, is_encoder

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class Words(NamedTuple):
    """Ids of the mask, of a stop, and of the classes' words (C,)."""

    mask: int
    stop: int
    classes: Sequence[int]


class ClozeTokens(LaidTokens):
    """At the model: the template around x; its logits are those of the classes' words (B, C)."""

    words: Tensor

    def __init__(self, first: int, template: tuple[int, int, int], words: Words) -> None:
        a, b, c = template
        stop = {} if c else {a + 1 + b: words.stop}
        super().__init__(first, a + 1 + b, c or 1, True, {a: words.mask, **stop})
        self.register_buffer("words", torch.tensor(words.classes))  # (C,)

    def forward(self, x: dict[str, Any], layer: Layer) -> Any:
        """The model on the laid rows, which answers with the classes' words."""
        out = super().forward(x, layer)
        out.logits = out.logits[:, 0, self.words]
        return out


class MaskState(Delta):
    """At the model's body: of the hidden states (B, T, D) that in one column, (B, 1, D)."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column

    def forward(self, x: dict[str, Any], layer: Layer) -> Any:
        """The body's output with the one hidden state."""
        out = layer(x)
        out.last_hidden_state = out.last_hidden_state[:, self.column, None]
        return out


def lay(
    host: Host, table: Site, delta: PromptDelta, template: tuple[int, int, int], words: Words
) -> None:
    """Put the template in: on the table, the body, and the model. Raises `NotApplicable` for a
    model without a masked-language head.
    """
    model = cast(Any, host.model)
    if not is_encoder(model) or model.get_output_embeddings() is None:
        raise NotApplicable(
            f"{type(model).__name__} fills no mask: method.label_words need an encoder with its "
            "masked-language head (BertForMaskedLM, RobertaForMaskedLM, ...)."
        )
    body = model.base_model_prefix
    width = table.d_out
    host.graft(table, delta)
    host.graft(Site(body, model.base_model, "model", width, width), MaskState(1 + template[0]))
    tokens = ClozeTokens(delta.first, template, words)
    host.graft(Site("", model, "model", width, width), tokens)
    host.matched[host.building] = {"prompt": 1, "classes as words": len(words.classes)}


def words_of(data: Calibration | None, label_words: Mapping[str, str]) -> Words:
    """The ids of the words of the task's classes; zeros where they come from an adapter's file.

    Raises `ConfigError` where classes and words do not fit, or a word is more than one token.
    """
    if data is None:
        return Words(0, 0, [0] * len(label_words))
    if set(label_words) != set(data.labels) or len(set(label_words.values())) < len(label_words):
        raise ConfigError(
            f"method.label_words={dict(label_words)}: must give each class a word of its own; the "
            f"classes are {', '.join(data.labels)}."
        )
    mask = data.tokenizer.mask_token_id
    if mask is None:
        raise ConfigError("method.label_words: the tokenizer has no mask token.")
    classes = [_token(data.tokenizer, f" {label_words[label]}") for label in data.labels]
    return Words(mask, _token(data.tokenizer, "."), classes)


def _token(tokenizer: Any, word: str) -> int:
    """The id of a word that is one token."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        pieces = tokenizer.convert_ids_to_tokens(ids)
        raise ConfigError(
            f"method.label_words: {word.strip()!r} is {pieces} to the tokenizer; a word must be "
            "one token that it knows."
        )
    return ids[0]
