"""The Power of Scale for Parameter-Efficient Prompt Tuning. Lester et al., EMNLP 2021, arXiv
2104.08691.

    X' = [E_p; embed(x)]      E_p (P, d), X' (P + T, d); targets only at x's own tokens

P free embeddings in front of a frozen model: the larger the model, the closer they come to training
all of it. An encoder-decoder has them in its encoder alone, as in the paper.

An encoder's classifier reads the first token, so there the prompt stands behind it ([CLS]
E_p x ...); Hugging Face peft lays it in front and reads a row of the prompt. The paper samples
`sample_vocab` among the 5,000 most frequent tokens; vocabularies are ordered by frequency or by
merges, so the first `vocab_top_k` ids are taken for them. Labels of several tokens start as the
mean of their embeddings. peft's own random start is normal with deviation 1, far from any token's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from peftcli.core.method import Method
from peftcli.core.site import Site
from peftcli.methods import prompt
from peftcli.methods.prompt import PromptDelta

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


@dataclass(frozen=True)
class PromptTuning(Method):
    """P trained embeddings in front of a row."""

    family: ClassVar[str] = "prompt"
    modalities: ClassVar[tuple[str, ...]] = ("text",)
    size_option: ClassVar[str | None] = "num_virtual_tokens"
    starts_at_base: ClassVar[bool] = False
    lays_tokens: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = "PROMPT_TUNING"
    hf_fields: ClassVar[Mapping[str, str]] = {"num_virtual_tokens": "num_virtual_tokens"}
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        "token_dim num_layers num_attention_heads num_transformer_submodules prompt_tuning_init"
        " prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs".split()
    )

    num_virtual_tokens: Annotated[int, Ge(1)] = 100
    init: Literal["class_label", "sample_vocab", "random", "text"] = "class_label"
    init_text: str = ""
    random_range: Annotated[float, Gt(0)] = 0.5
    vocab_top_k: Annotated[int, Ge(1)] = 5000

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """The prompt on the embedding table of the first stack."""
        table = prompt.table_of(host)
        E = self._start(table, data).float()
        delta = PromptDelta(E, prompt.first_free(table))
        prompt.lay(host, table, delta, self.num_virtual_tokens)

    @torch.no_grad()
    def _start(self, table: Site, data: Calibration | None) -> Tensor:
        """E_p (P, d); what needs the task starts as `sample_vocab` where a file follows."""
        P = self.num_virtual_tokens
        if self.init == "random":
            return torch.empty(P, table.d_out).uniform_(-self.random_range, self.random_range)
        if self.init == "text" and data is not None:
            return self._embed(table, prompt.ids_of(data, self.init_text, P))
        E = self._embed(table, torch.randint(min(self.vocab_top_k, table.d_in), (P,)))
        if self.init == "class_label" and data is not None and data.tokenizer is not None:
            for row, label in zip(E, data.labels, strict=False):
                ids = data.tokenizer(label, add_special_tokens=False)["input_ids"]
                row.copy_(self._embed(table, torch.tensor(ids)).mean(0))
        return E

    @staticmethod
    def _embed(table: Site, ids: Tensor) -> Tensor:
        """Rows of the table, scaled as the model scales them."""
        return table.module(ids.to(table.device)).clone()

    def published(self, host: Host, name: str) -> Method:
        """Without a start."""
        return replace(self, init="random", init_text="")

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """Heads that read one token would read a row of the prompt."""
        return prompt.refuses_prompt(host)

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """Sizes; one stack."""
        return {**prompt.sizes(host, name), "prompt_tuning_init": "RANDOM"}

    def hf_tensors(self, host: Host, name: str) -> dict[str, Tensor]:
        """E_p (P, d)."""
        return {"prompt_embeddings": prompt.prompt_of(host, name).rows().detach()}

    @classmethod
    def hf_acting(
        cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Without the rows of a decoder, which peft allocates and never uses."""
        return prompt.acting_rows(config, tensors)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The start does not matter. Raises ValueError for heads that read one token."""
        prompt.refuse_heads(config)
        return {"init": "random"}
