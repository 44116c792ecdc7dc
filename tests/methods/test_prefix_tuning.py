"""What prefix tuning promises: worked numbers, counts, starts, visibility, peft's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    DebertaV2Config,
    GPT2Config,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
)
from transformers import DebertaV2ForSequenceClassification as Deberta
from transformers import RobertaForSequenceClassification as Roberta

from peftcli.core.graft import activate, graft
from peftcli.core.host import Host
from peftcli.data.collate import causal_collator
from peftcli.errors import ConfigError, NotApplicable
from peftcli.export import adapter
from peftcli.kernels.packed_attention import packed_attention, packed_attention_ref
from peftcli.methods.prefix import PrefixDelta, prefixes_of
from peftcli.methods.prefix_tuning import PrefixTuning
from peftcli.models.attention import packed_rows
from peftcli.models.load import empty_model
from peftcli.train import objective
from tests import tiny
from tests.kernels.test_packed_attention import LAYOUTS, operands
from tests.train.conftest import chats

P = 5


class Words:
    """A calibration that only reads words."""

    labels = ()

    @staticmethod
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def adapted(model: str, data: Any = None, **fields: Any) -> Host:
    torch.manual_seed(3)
    host = Host(tiny.models()[model]())
    host.add(PrefixTuning(**{"prefix_length": P, "mid_dim": 12, **fields}), data=data)
    return host


def stored(host: Host) -> int:
    host.adapters["default"].finish(host)
    return host.num_parameters()[0]


def test_gpt2_medium_stores_245760_and_trains_25744896() -> None:
    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    host = Host(empty_model(config, "causal_lm"))
    host.add(PrefixTuning(prefix_length=5))
    assert host.num_parameters()[0] == 25_744_896
    host.remove("default")
    for length, count in ((5, 245_760), (10, 491_520)):
        host.add(PrefixTuning(prefix_length=length, prefix_projection=False))
        assert host.num_parameters()[0] == count
        host.remove("default")


@pytest.mark.parametrize(
    ("length", "count", "percent"),
    [(200, 14_745_600, 3.63), (100, 7_372_800, 1.81), (5, 368_640, 0.09)],
)
def test_bart_large_has_three_prefixes_of_twelve_layers(
    length: int, count: int, percent: float
) -> None:
    config = BartConfig(d_model=1024, encoder_layers=12, decoder_layers=12)
    host = Host(empty_model(config, "seq2seq"))
    assert host.num_parameters()[1] == 406_291_456
    assert round(100 * count / 406_291_456, 2) == percent
    host.add(PrefixTuning(prefix_length=length, prefix_projection=False))
    assert host.num_parameters()[0] == count
    assert host.matched["default"] == {"encoder": 12, "decoder": 12, "cross": 12}


def test_each_prefix_of_an_encoder_decoder_has_its_own_embedding() -> None:
    host = adapted("t5")
    shared = host.shared()
    assert isinstance(shared, nn.ModuleDict)
    assert sorted(shared) == ["cross", "decoder", "encoder"]


# -- the equation ----------------------------------------------------------------------------------
class Core(nn.Module):
    """An attention without projections."""

    is_causal = True

    def forward(self, x: Tensor) -> Tensor:
        return x


def one_head(keys: list[float], values: list[float]) -> float:
    """The output for q = 1 and the token (k, v) = (0, 3) behind a prefix, head size 1."""
    core = Core()
    if keys:
        delta = PrefixDelta(len(keys), 1)
        assert delta.W is not None
        delta.W.data = torch.tensor([keys, values]).T.contiguous()
        graft(core, "default", delta)
    one, zero, three = (torch.full((1, 1, 1, 1), value) for value in (1.0, 0.0, 3.0))
    return packed_rows(core, one, zero, three, None, scaling=1.0)[0].item()


def test_a_prefix_takes_its_share_of_the_softmax() -> None:
    assert one_head([], []) == pytest.approx(3.0)
    assert one_head([0.0], [1.0]) == pytest.approx(2.0)
    assert one_head([0.0] * 4, [0.0] * 4) == pytest.approx(0.6)


def test_attention_is_the_lse_merge_of_prefix_and_tokens() -> None:
    torch.manual_seed(0)
    core, T = Core(), 7
    graft(core, "default", PrefixDelta(P, 3 * 8).double())
    q, k, v = torch.randn(3, 2, 3, T, 8, dtype=torch.float64)
    ours = packed_rows(core, q, k, v, None)[0]
    K, V = (t.view(2, P, 3, 8).transpose(1, 2) for t in core.deltas["default"].keys_values(2))
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    scores = (q @ k.mT / 8**0.5).masked_fill(~seen, -torch.inf), q @ K.mT / 8**0.5
    l1, l2 = (s.logsumexp(-1, keepdim=True) for s in scores)
    o1, o2 = (s.softmax(-1) @ values for s, values in zip(scores, (v, V), strict=True))
    merged = (l1.exp() * o1 + l2.exp() * o2) / (l1.exp() + l2.exp())
    torch.testing.assert_close(ours, merged.transpose(1, 2), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_segment_of_a_packed_row_sees_the_prefix(layout: str) -> None:
    segments = LAYOUTS[layout]
    q, k, v = operands(segments[-1].stop, 2, torch.float64)
    before = torch.randn(2, 1, k.shape[1], P, k.shape[3], dtype=torch.float64).unbind()
    ours = packed_attention(q, k, v, segments, 0.3, 0.0, before)
    wanted = packed_attention_ref(q, k, v, segments, 0.3, before)
    torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-10)


def test_packed_rows_give_the_loss_of_rows_apart() -> None:
    host, examples = adapted("llama"), chats(5)
    packed, padded = (
        objective.loss_sum("causal_lm", host.model, causal_collator(0, packing)(examples))
        for packing in (True, False)
    )
    torch.testing.assert_close(packed, padded, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_first_token_sees_the_whole_prefix_of_the_last_layer(model: str) -> None:
    host = adapted(model, prefix_projection=False)
    batch = tiny.batch(model)
    host.model(input_ids=batch["input_ids"]).logits[:, 0].square().sum().backward()
    *_, last = prefixes_of(host, "default")
    assert last.W is not None
    _, grad_V = last.W.grad.chunk(2, 1)
    assert (grad_V.abs().sum(1) > 0).all()


def test_a_sliding_window_never_hides_the_prefix() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=64, sliding_window=3, **sizes, **heads))
    host = Host(model.eval())
    host.add(PrefixTuning(prefix_length=P, prefix_projection=False))
    ids = tiny.batch("llama")["input_ids"]
    host.model(input_ids=ids).logits[:, -1].square().sum().backward()
    *_, last = prefixes_of(host, "default")
    assert (last.W.grad.chunk(2, 1)[1].abs().sum(1) > 0).all()
    with torch.no_grad():
        far = ids.clone()
        far[:, 0] = 60  # five tokens of two windows reach back
        torch.testing.assert_close(
            model(input_ids=far).logits[:, 5:], model(input_ids=ids).logits[:, 5:]
        )


@pytest.mark.parametrize("model", ["llama", "t5"])
def test_beams_have_each_their_prefix(model: str) -> None:
    host, ids = adapted(model), tiny.batch(model)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    given = [
        host.model.generate(input_ids=x, attention_mask=torch.ones_like(x), **options, **cache)
        for x, cache in ((ids, {}), (ids, {"use_cache": False}), (ids[:1], {}))
    ]
    assert torch.equal(given[0], given[1])
    assert torch.equal(given[0][:1], given[2])


def test_each_row_drops_its_own_entries_only_while_training() -> None:
    delta = PrefixDelta(40, 8, dropout=0.5).train()
    K, _ = delta.keys_values(2)
    assert 0.3 < (K == 0).float().mean() < 0.7
    assert not torch.equal(K[0], K[1])
    assert torch.equal(delta.eval().keys_values(2)[0][1], delta.table()[:, :8])


# -- padding, cache, positions ---------------------------------------------------------------------
@pytest.mark.parametrize("model", ["llama", "gpt2"])
@pytest.mark.parametrize("offset", ["prefix", "zero"])
def test_a_left_padded_row_gives_the_tokens_of_the_row_alone(model: str, offset: str) -> None:
    host, ids = adapted(model, position_offset=offset), tiny.batch(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False}
    padded = host.model.generate(input_ids=ids, attention_mask=mask, **options)
    alone = ids[:1, 3:]
    alone = host.model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **options)
    assert torch.equal(padded[0, -5:], alone[0, -5:])
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(
        host.model.generate(input_ids=ids, attention_mask=mask, **options, **static), padded
    )


def test_tokens_start_at_the_prefix_length_or_at_zero() -> None:
    ids = tiny.batch("gpt2")["input_ids"]
    moved, kept = (adapted("gpt2", position_offset=o).model for o in ("prefix", "zero"))
    at_P = kept(input_ids=ids, position_ids=torch.arange(P, P + ids.shape[1])[None]).logits
    torch.testing.assert_close(moved(input_ids=ids).logits, at_P)
    assert (at_P - kept(input_ids=ids).logits).abs().max() > 1e-4


def test_positions_of_roberta_follow_its_padding() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = RobertaConfig(vocab_size=70, num_attention_heads=4, pad_token_id=1, **sizes)
    ids = tiny.batch("bert")["input_ids"]
    model = Roberta(config).eval()
    wanted = model(input_ids=ids, position_ids=torch.arange(2 + P, 11 + P)[None]).logits
    host = Host(model)
    host.add(PrefixTuning(prefix_length=P, prefix_projection=False))
    for path in host.layout.attention_cores:  # what is left of the method is the shift
        activate(model.get_submodule(path), ())
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-6, rtol=1e-5)


# -- starts and folding ----------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_keys_of_a_text_continue_it(model: str) -> None:
    fields = {"init": "activations", "init_text": "7 8 9", "prefix_projection": False}
    host = adapted(model, Words(), **fields)
    ids = tiny.batch(model)["input_ids"][:1]
    text = torch.tensor([[7, 8, 9, 7, 8]])  # repeated to P tokens
    wanted = tiny.models()[model]()(input_ids=torch.cat([text, ids], 1)).logits[:, P:]
    torch.testing.assert_close(host.model(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)


def test_the_map_is_brought_towards_the_keys_of_a_text() -> None:
    fields = {"init": "activations", "init_text": "7 8 9"}
    far, near = adapted("llama"), adapted("llama", Words(), **fields)
    exact = adapted("llama", Words(), **fields, prefix_projection=False)
    goal, start, end = (
        torch.cat([d.table() for d in prefixes_of(host, "default")], 1)
        for host in (exact, far, near)
    )
    assert (end - goal).square().mean() < 0.5 * (start - goal).square().mean()


@pytest.mark.parametrize("model", ["t5", "bert"])
def test_a_text_starts_only_decoders(model: str) -> None:
    with pytest.raises(ConfigError, match="reads the cache of a decoder"):
        adapted(model, Words(), init="activations", init_text="7")


def test_a_start_from_a_text_needs_one() -> None:
    with pytest.raises(ConfigError, match="has no tokens"):
        adapted("llama", Words(), init="activations")


@pytest.mark.parametrize("projection", [True, False])
def test_zero_is_not_the_identity(projection: bool) -> None:
    host = adapted("llama", init="zero", prefix_projection=projection)
    assert all(not d.table().any() for d in prefixes_of(host, "default"))
    batch = {"input_ids": tiny.batch("llama")["input_ids"]}
    base = tiny.models()["llama"]()(**batch).logits
    assert (host.model(**batch).logits - base).abs().max() > 1e-4


@pytest.mark.parametrize("model", sorted(tiny.models()))
def test_the_folded_table_gives_the_same_logits(model: str) -> None:
    host, batch = adapted(model), tiny.batch(model)
    before = host.model(**batch).logits
    host.adapters["default"].finish(host)
    torch.testing.assert_close(host.model(**batch).logits, before, atol=1e-6, rtol=1e-5)
    assert {n.rpartition(".")[2] for n in host.trained()} == {"W"}
    assert not any("deltas_shared" in n for n in host.state())


# -- Hugging Face peft -----------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
def test_a_prefix_of_peft_is_read_as_peft_computes_it(
    model: str, projection: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    task = "SEQ_CLS" if model == "bert" else "CAUSAL_LM"
    config = peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=P, prefix_projection=projection
    )
    theirs = peft.get_peft_model(tiny.models()[model](), config).eval()
    theirs.save_pretrained(tmp_path)
    host = Host(tiny.models()[model]())
    adapter.load(host, tmp_path)
    ids = tiny.batch(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    ours, stock = (m(input_ids=ids, attention_mask=mask).logits for m in (host.model, theirs))
    if model == "bert":
        torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(ours[mask > 0], stock[mask > 0], atol=1e-5, rtol=1e-4)


def test_what_peft_cannot_hold_is_said(tmp_path: Path) -> None:
    for model, fields, why in (
        ("t5", {}, "not three"),
        ("vit", {}, "does not take"),
        ("gpt2", {"position_offset": "zero"}, "counts the prefix"),
    ):
        host = adapted(model, **fields)
        assert why in (host.adapters["default"].hf_refuses(host, "default") or "")
    with pytest.raises(ValueError, match="every other pair"):
        PrefixTuning.from_hf({"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2})


# -- refusals --------------------------------------------------------------------------------------
def test_attention_outside_the_registry_is_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = DebertaV2Config(vocab_size=64, num_attention_heads=4, **sizes)
    with pytest.raises(NotApplicable, match="attention registry"):
        Host(Deberta(config)).add(PrefixTuning())
    eager = tiny.models()["llama"]()
    eager.set_attn_implementation("eager")
    with pytest.raises(NotApplicable, match="LlamaForCausalLM"):
        Host(eager).add(PrefixTuning())


def test_two_prefixes_stand_side_by_side() -> None:
    host = adapted("llama", prefix_projection=False, position_offset="zero")
    host.add(PrefixTuning(prefix_length=3, position_offset="zero"), "second")
    batch = {"input_ids": tiny.batch("llama")["input_ids"]}
    host.activate("second", "default")
    swapped = host.model(**batch).logits
    host.activate("default", "second")
    torch.testing.assert_close(host.model(**batch).logits, swapped, atol=1e-6, rtol=1e-5)
    host.activate()
    base = tiny.models()["llama"]()(**batch).logits
    torch.testing.assert_close(host.model(**batch).logits, base)
