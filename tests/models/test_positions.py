"""Rows that a model has no positions for are refused before training."""

from __future__ import annotations

import pytest
from transformers import BartConfig, RobertaConfig

from peftcli.core.host import Host
from peftcli.core.method import Method
from peftcli.errors import ConfigError
from peftcli.methods.lora import LoRA
from peftcli.methods.p_tuning import PTuning
from peftcli.methods.prefix_tuning import PrefixTuning
from peftcli.methods.prompt_tuning import PromptTuning
from peftcli.models.load import empty_model
from peftcli.models.positions import num_positions, refuse_long_rows
from tests import tiny


def test_positions_are_counted_where_they_are_looked_up() -> None:
    assert num_positions(Host(tiny.bert())) == num_positions(Host(tiny.gpt2())) == 512
    assert num_positions(Host(tiny.llama())) is num_positions(Host(tiny.t5())) is None
    roberta = RobertaConfig(max_position_embeddings=514, num_hidden_layers=1)
    assert num_positions(Host(empty_model(roberta, "classification"))) == 512
    bart = BartConfig(encoder_layers=1, decoder_layers=1)
    assert num_positions(Host(empty_model(bart, "seq2seq"))) == 1024


@pytest.mark.parametrize(
    ("method", "taken"),
    [
        (LoRA(), 0),
        (PromptTuning(num_virtual_tokens=100), 100),
        (PTuning(variant="v1", template=(3, 3, 3)), 9),
        (PrefixTuning(prefix_length=10), 10),
        (PrefixTuning(prefix_length=10, position_offset="zero"), 0),
    ],
)
def test_what_a_method_lays_into_a_row_counts(method: Method, taken: int) -> None:
    model = "gpt2" if isinstance(method, PrefixTuning) else "bert"
    host = Host(tiny.models()[model]())
    host.add(method)
    refuse_long_rows(host, {"train": {"max_length": 512 - taken}, "eval": None})
    with pytest.raises(ConfigError, match=rf"dataset.max_length={512 - taken} "):
        refuse_long_rows(host, {"train": {"max_length": 9}, "eval": {"max_length": 513 - taken}})
