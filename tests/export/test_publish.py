"""What is saved of a merged model is what transformers reads again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftcli.core.host import Host
from peftcli.errors import ConfigError
from peftcli.export.publish import declare_biases
from peftcli.methods.bitfit import BitFit
from tests import tiny


def merged(model: str) -> Host:
    torch.manual_seed(3)
    host = Host(tiny.models()[model]())
    host.add(BitFit(add_missing_bias=True))
    with torch.no_grad():
        for parameter in host.trained().values():
            parameter.normal_(std=0.1)
    host.merge()
    return host


def test_biases_that_merging_added_are_declared_and_read_again(tmp_path: Path) -> None:
    host = merged("llama")
    with torch.no_grad():
        wanted = host.model(**tiny.batch("llama")).logits
    declare_biases(host)
    with host.bare() as model:
        model.save_pretrained(tmp_path)
    again = type(tiny.models()["llama"]()).from_pretrained(tmp_path).eval()
    assert again.config.attention_bias
    with torch.no_grad():
        torch.testing.assert_close(again(**tiny.batch("llama")).logits, wanted)


def test_an_architecture_without_a_place_for_them_is_refused() -> None:
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration has no place for"):
        declare_biases(merged("t5"))
