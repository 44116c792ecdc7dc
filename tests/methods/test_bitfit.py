"""What BitFit promises: counts of BERT, which tensors change, added biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BloomConfig, PreTrainedConfig, RobertaConfig, T5Config

from peftcli.core.host import Host
from peftcli.errors import ConfigError, NotApplicable
from peftcli.export import adapter
from peftcli.methods.bitfit import BiasDelta, BitFit
from peftcli.methods.sparse import SparseDelta
from peftcli.models.load import empty_model
from tests import tiny

LABELS = ("no", "yes")
BASE = BertConfig(vocab_size=28996)
SIZES: Any = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
LARGE = BertConfig(vocab_size=28996, **SIZES)


def count(host: Host, **options: object) -> int:
    host.add(BitFit(**options))
    return sum(host.model.get_parameter(n).numel() for n in host.selected)


@pytest.mark.parametrize(
    ("config", "terms", "wanted"),
    [
        (BASE, ("all",), 102_912),
        (LARGE, ("all",), 272_384),
        (BASE, ("q", "up"), 46_848),
        (BASE, ("query", "intermediate.dense"), 46_848),
        (BASE, ("output.dense",), 12 * 2 * 768 + 768),
        (BASE, ("output.LayerNorm",), 12 * 2 * 768 + 768),
        (BASE, ("attention.output.LayerNorm",), 12 * 768 + 768),
        (BASE, ("norm",), 25 * 768 + 768),
        (RobertaConfig(), ("all",), 102_144),
        (RobertaConfig(**SIZES), ("all",), 271_360),
    ],
    ids="base large small names dense norms attention-norm every-norm roberta robertas".split(),
)
def test_parameters_without_the_head(config: object, terms: tuple[str, ...], wanted: int) -> None:
    host = Host(empty_model(config, "classification", LABELS))
    total = count(host, bias_terms=terms)
    head = sum(
        host.model.get_parameter(n).numel() for n in host.selected if n.startswith("classifier")
    )
    assert total - head == wanted


@pytest.mark.parametrize(
    ("config", "terms", "counts", "percent"),
    [
        (BASE, ("all",), (102_912, 108_310_272), 0.095),
        (BASE, ("q", "up"), (46_848, 108_310_272), 0.043),
        (LARGE, ("all",), (272_384, 333_579_264), 0.082),
    ],
)
def test_shares_of_the_paper_and_a_fresh_head_beside(
    config: PreTrainedConfig, terms: tuple[str, ...], counts: tuple[int, int], percent: float
) -> None:
    host = Host(empty_model(config, "classification", LABELS), ["classifier"])
    host.add(BitFit(bias_terms=terms))
    head = 2 * config.hidden_size + 2
    assert host.num_parameters() == (counts[0] + head, counts[1] + head)
    assert round(100 * counts[0] / counts[1], 3) == percent


def test_parameters_of_bloom() -> None:
    config = BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32)
    assert count(Host(empty_model(config, "causal_lm"))) == 1_359_872


def test_t5_has_tables_named_bias_but_no_biases() -> None:
    host = Host(tiny.models()["t5"]())
    assert any(n.endswith("relative_attention_bias.weight") for n in host.model.state_dict())
    with pytest.raises(NotApplicable, match="add_missing_bias=true"):
        host.add(BitFit())


def test_biases_added_to_t5_base() -> None:
    config = T5Config(
        d_model=768,
        d_ff=2048,
        num_layers=12,
        num_heads=12,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    host = Host(empty_model(config, "seq2seq"))
    host.add(BitFit(add_missing_bias=True))
    assert host.num_parameters()[0] == 227_328
    host.remove("default")
    host.add(BitFit(bias_terms=("all-linear", "lm_head"), add_missing_bias=True))
    assert host.num_parameters()[0] == 259_456


def test_only_biases_and_the_head_change_in_a_step() -> None:
    host = Host(tiny.models()["bert"](), ["classifier"])
    host.add(BitFit())
    before = {n: p.clone() for n, p in host.model.named_parameters()}
    optimizer = torch.optim.AdamW(host.trained().values(), lr=0.1)
    host.model(**tiny.batch("bert")).loss.backward()
    optimizer.step()
    changed = {n for n, p in host.model.named_parameters() if not torch.equal(p, before[n])}
    assert "bert.embeddings.LayerNorm.bias" in changed
    assert all(n.endswith(".bias") or n.startswith("classifier.") for n in changed)
    assert changed == set(host.trained())


def test_biases_never_decay() -> None:
    host = Host(tiny.models()["bert"]())
    method = BitFit()
    host.add(method)
    assert [g["weight_decay"] for g in method.param_groups(host, 1e-3, 0.1)] == [0.0]


def test_added_biases_start_at_the_base_and_fold() -> None:
    host = Host(tiny.models()["llama"]())
    batch = tiny.batch("llama")
    base = host.model(**batch).logits
    host.add(BitFit(add_missing_bias=True))
    assert len(host.sites["default"]) == 3 * 7
    assert torch.equal(host.model(**batch).logits, base)
    with torch.no_grad():
        for p in host.trained().values():
            p.normal_(std=0.1)
        apart = host.model(**batch).logits
        host.merge()
        torch.testing.assert_close(host.model(**batch).logits, apart, atol=1e-5, rtol=1e-5)
        assert host.model.model.layers[0].self_attn.q_proj.bias is not None
        host.unmerge()
    assert host.model.model.layers[0].self_attn.q_proj.bias is None


def test_the_gradient_of_a_bias_is_the_sum_of_those_of_the_outputs() -> None:
    host = Host(tiny.models()["llama"]())
    host.add(BitFit(bias_terms=("down",), add_missing_bias=True))
    outputs = []
    module = host.model.model.layers[1].mlp.down_proj
    module.register_forward_hook(lambda m, args, y: (y.retain_grad(), outputs.append(y))[1])
    host.model(**tiny.batch("llama")).loss.backward()
    bias = dict(module.named_parameters())["deltas.default.bias"]
    torch.testing.assert_close(bias.grad, outputs[0].grad.sum((0, 1)))


def test_roles_of_a_fused_linear_train_their_rows_alone() -> None:
    host = Host(tiny.models()["gpt2"]())
    host.add(BitFit(bias_terms=("q", "up")))
    assert {s.name for s, _ in host.deltas()} == {
        f"transformer.h.{i}.attn.c_attn[q]" for i in range(2)
    }
    assert all(isinstance(delta, BiasDelta) for _, delta in host.deltas())
    assert host.num_parameters()[0] == 2 * (32 + 128)


def test_a_misspelt_term_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="'qurey' matches no module"):
        Host(tiny.models()["bert"]()).add(BitFit(bias_terms=("qurey",)))


def test_the_control_trains_as_many_weights_drawn_by_size() -> None:
    host = Host(tiny.models()["bert"](), ["classifier"])
    plain = count(Host(tiny.models()["bert"](), ["classifier"])) - 32 * 3 - 3
    base = host.model(**tiny.batch("bert")).logits
    host.add(BitFit(random_entries="equal"))
    deltas = {site.name: (site, delta) for site, delta in host.deltas()}
    assert sum(len(delta.values) for _, delta in deltas.values()) == plain
    assert "classifier" not in deltas
    total = sum(site.d_in * site.d_out for site, _ in deltas.values())
    for site, delta in deltas.values():
        assert isinstance(delta, SparseDelta)
        assert abs(len(delta.values) - plain * site.d_in * site.d_out / total) <= 1
        assert len(delta.indices.unique()) == len(delta.indices)
    assert torch.equal(host.model(**tiny.batch("bert")).logits, base)


def test_the_control_of_a_number_of_its_own_is_read_back(tmp_path: Path) -> None:
    host = Host(tiny.models()["gpt2"]())
    host.add(BitFit(random_entries=77))
    assert host.num_parameters()[0] == 77
    with torch.no_grad():
        for p in host.trained().values():
            p.normal_()
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    again = Host(tiny.models()["gpt2"]())
    adapter.load(again, tmp_path)
    batch = tiny.batch("gpt2")
    assert torch.equal(again.model(**batch).logits, host.model(**batch).logits)
    with pytest.raises(ConfigError, match=r"random_entries=.* has \d+ weights"):
        Host(tiny.models()["gpt2"]()).add(BitFit(random_entries=10**7))


def test_a_model_without_biases_has_no_equal_number() -> None:
    with pytest.raises(NotApplicable, match="has no bias"):
        Host(tiny.models()["llama"]()).add(BitFit(random_entries="equal"))
