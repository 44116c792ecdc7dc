"""What the mix promises: it is its two parts and nothing else; counts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import BartConfig, RobertaConfig

from peftcli.core.host import Host
from peftcli.errors import ConfigError
from peftcli.methods.mam import MAM
from peftcli.methods.parallel_adapter import BesideDelta, ParallelAdapter
from peftcli.methods.prefix_tuning import PrefixTuning
from peftcli.models.load import empty_model
from tests import tiny

BART = BartConfig()  # large
ROBERTA = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)


def logits(method: Any, model: str) -> Tensor:
    torch.manual_seed(4)
    host = Host(tiny.models()[model]())
    host.add(method)
    with torch.no_grad():
        return host.model(**tiny.batch(model)).logits


@pytest.mark.parametrize(
    ("config", "task", "fields", "training", "stored", "share"),
    [
        (BART, "seq2seq", {}, 61_608_288 + 25_202_688, 27_414_528, (6.75, 406_291_456)),
        (
            ROBERTA,
            "classification",
            {"prefix_length": 16, "ffn_r": 16},
            15_695_840,
            599_232,
            (0.48, 124_645_632),
        ),
    ],
    ids=["bart-large", "roberta-base"],
)
def test_counts_while_training_and_as_stored(
    config: Any, task: Any, fields: Any, training: int, stored: int, share: tuple[float, int]
) -> None:
    assert round(100 * stored / share[1], 2) == share[0]
    host = Host(empty_model(config, task))
    method = MAM(**fields)
    host.add(method)
    assert host.num_parameters()[0] == training
    method.finish(host)
    assert sum(t.numel() for t in host.state().values()) == stored


@pytest.mark.parametrize("model", ["llama", "bert", "t5"])
def test_without_a_part_it_is_the_other(model: str) -> None:
    alone = logits(ParallelAdapter(ffn_r=4, ffn_init="bert"), model)
    assert torch.equal(logits(MAM(prefix_length=0, ffn_r=4, ffn_init="bert"), model), alone)
    prefix = PrefixTuning(prefix_length=3, mid_dim=5, position_offset="zero")
    mix = MAM(prefix_length=3, prefix_mid_dim=5, ffn_r=0)
    assert torch.equal(logits(mix, model), logits(prefix, model))


@pytest.mark.parametrize("model", ["gpt2", "t5", "vit"])
def test_the_branch_is_zero_at_the_start(model: str) -> None:
    both = logits(MAM(prefix_length=3, ffn_r=4), model)
    assert torch.equal(both, logits(MAM(prefix_length=3, ffn_r=0), model))


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_the_folded_prefix_gives_the_same(model: str) -> None:
    host = Host(tiny.models()[model]())
    method = MAM(prefix_length=3, prefix_mid_dim=5, ffn_r=4)
    host.add(method)
    before = host.model(**tiny.batch(model)).logits
    method.finish(host)
    torch.testing.assert_close(host.model(**tiny.batch(model)).logits, before)
    assert cast(MAM, method.published(host, "default")).prefix_mlp is False


def test_a_row_does_not_see_the_others() -> None:
    host = Host(tiny.bert())
    host.add(MAM(prefix_length=3, ffn_r=4, ffn_init="bert"))
    batch = {k: v for k, v in tiny.batch("bert").items() if k != "labels"}
    both = host.model(**batch).logits
    one = host.model(**{k: v[:1] for k, v in batch.items()}).logits
    torch.testing.assert_close(both[:1], one, atol=1e-6, rtol=1e-5)


def test_a_direct_prefix_starts_small() -> None:
    torch.manual_seed(0)
    host = Host(tiny.bert())
    host.add(MAM(prefix_mlp=False, prefix_length=64))
    tables = [p for n, p in host.trained().items() if n.endswith(".W")]
    assert torch.cat(tables).std().item() == pytest.approx(0.02, rel=0.05)
    assert any(isinstance(d, BesideDelta) for _, d in host.deltas())


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave nothing to train"):
        Host(tiny.bert()).add(MAM(prefix_length=0, ffn_r=0))


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({}, "no adapter of a prefix and branches"),
        ({"ffn_r": 0}, "counts the prefix in positions"),
        ({"prefix_length": 0}, "no such method"),
    ],
)
def test_it_says_why_peft_cannot_hold_it(fields: dict[str, int], why: str) -> None:
    host = Host(tiny.llama())
    host.add(MAM(**{"prefix_length": 3, "ffn_r": 4, **fields}))
    assert why in (host.adapters["default"].hf_refuses(host, "default") or "")
