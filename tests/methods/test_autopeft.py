"""What the space of AutoPEFT promises: counts, its parts alone, layers left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig

from peftcli.core.host import Host
from peftcli.errors import ConfigError
from peftcli.methods.autopeft import AutoPEFT
from peftcli.methods.bottleneck_adapter import BottleneckAdapter
from peftcli.methods.mam import MAM
from peftcli.models.load import empty_model
from tests import tiny


def logits(method: Any, model: str) -> Tensor:
    torch.manual_seed(4)
    host = Host(tiny.models()[model]())
    host.add(method)
    with torch.no_grad():
        return host.model(**tiny.batch(model)).logits


def count(**fields: Any) -> int:
    """Numbers trained on BERT-base, without the map."""
    host = Host(empty_model(BertConfig(), "classification"))
    host.add(AutoPEFT(prefix_mlp=False, **fields))
    return host.num_parameters()[0]


def test_counts_are_the_paper_s_formula_and_biases() -> None:
    assert count(serial_r=48, ffn_r=0, prefix_length=0) == 884_736 + 12 * (48 + 768)
    five = {str(layer): layer >= 5 for layer in range(12)}
    biases = 5 * (3 + 768) + 5 * (6 + 768)
    assert count(serial_r=3, ffn_r=6, prefix_length=1, leave_out=five) == 76_800 + biases


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_with_one_part_it_is_that_method(model: str) -> None:
    mix = AutoPEFT(serial_r=0, prefix_length=2, ffn_r=4)
    same = MAM(prefix_length=2, ffn_r=4, ffn_init="bert")
    assert torch.equal(logits(mix, model), logits(same, model))
    serial = BottleneckAdapter(preset="pfeiffer", bottleneck_dim=4, original_ln_before=False)
    alone = AutoPEFT(serial_r=4, prefix_length=0, ffn_r=0)
    assert torch.equal(logits(alone, model), logits(serial, model))


def test_layers_left_out_have_no_part() -> None:
    host = Host(tiny.models()["bert"]())
    host.add(AutoPEFT(leave_out={"0": True, "1": False}))
    names = [name for name in host.trained() if "layer." in name]
    assert names
    assert not [name for name in names if "layer.0." in name]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"serial_r": 0, "ffn_r": 0, "prefix_length": 0}, "nothing to train"),
        ({"leave_out": {"7": True}}, "no layer 7; layers are 0 to 1"),
        ({"leave_out": {"0": True, "1": True}}, "leave_out"),
    ],
)
def test_points_that_train_nothing_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Host(tiny.models()["bert"]()).add(AutoPEFT(**fields))
