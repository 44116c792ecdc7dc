"""What the unified view promises: the points of its design space, identities, counts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartConfig, RobertaConfig

from peftcli.core.graft import graft
from peftcli.core.host import Host
from peftcli.errors import ConfigError, NotApplicable
from peftcli.methods.adapter import Bottleneck, projections
from peftcli.methods.heads import HeadsDelta
from peftcli.methods.parallel_adapter import BesideDelta, ParallelAdapter
from peftcli.methods.prefix import PrefixDelta
from peftcli.models.attention import packed_rows
from peftcli.models.load import empty_model
from tests import tiny

BART = BartConfig()  # large
ROBERTA = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
ATTENTION = ("concat", "cross_attn_noln", "cross_attn", "cross_attn_relu", "parallel", "sequential")


def moved(model: str, **fields: Any) -> Host:
    """A tiny model in float64 under the method, off its start."""
    torch.manual_seed(5)
    host = Host(tiny.models()[model]())
    host.add(ParallelAdapter(**{"ffn_r": 6, "attn_r": 3, **fields}))
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.3 * torch.randn_like(p))
    host.model.double()
    return host


def of_kind(host: Host, kind: type) -> list[Any]:
    return [d for _, d in host.deltas() if isinstance(d, kind)]


def first(y: Any) -> Tensor:
    return y[0] if isinstance(y, tuple) else y


def test_the_worked_example_with_scale_four() -> None:
    down, up = projections(2, 1, "lora")
    core = Bottleneck(2, down, up, "relu", scale=4.0)
    with torch.no_grad():
        down.weight.copy_(torch.tensor([[0.5, -0.5]]))
        down.bias.fill_(0.1)
        up.weight.copy_(torch.tensor([[2.0], [-1.0]]))
        up.bias.copy_(torch.tensor([0.0, 0.5]))
    torch.testing.assert_close(core(torch.tensor([[1.0, -2.0]])), torch.tensor([[12.8, -4.4]]))


@pytest.mark.parametrize(
    ("config", "task", "fields", "wanted", "percent"),
    [
        (BART, "seq2seq", {"ffn_r": 512}, 25_202_688, 6.20),
        (BART, "seq2seq", {"ffn_r": 1024}, 50_380_800, 12.40),
        (BART, "seq2seq", {"ffn_r": 0, "attn_kind": "concat", "attn_r": 200}, 14_745_600, 3.63),
        (
            BART,
            "seq2seq",
            {"ffn_r": 0, "attn_kind": "cross_attn_noln", "attn_r": 30},
            2_211_840,
            0.54,
        ),
        (ROBERTA, "classification", {"ffn_r": 16}, 304_320, 0.25),
    ],
    ids=["r512", "r1024", "prefix", "heads", "roberta"],
)
def test_counts_of_the_paper(
    config: Any, task: Any, fields: Any, wanted: int, percent: float
) -> None:
    host = Host(empty_model(config, task))
    head = sum(p.numel() for n, p in host.model.named_parameters() if n.startswith("classifier"))
    base = host.num_parameters()[1] - head
    assert base == {"seq2seq": 406_291_456, "classification": 124_645_632 - 590_592}[task]
    host.add(ParallelAdapter(**fields))
    assert host.num_parameters()[0] == wanted
    assert round(100 * wanted / base, 2) == percent


@pytest.mark.parametrize("model", sorted(tiny.models()))
@pytest.mark.parametrize("insertion", ["parallel", "sequential"])
def test_lora_init_starts_at_the_base_bit_for_bit(model: str, insertion: Any) -> None:
    host = Host(tiny.models()[model]())
    base = host.model(**tiny.batch(model)).logits
    host.add(ParallelAdapter(ffn_r=4, ffn_insertion=insertion, ffn_scale="learned"))
    assert torch.equal(host.model(**tiny.batch(model)).logits, base)


def test_a_folded_branch_is_a_wider_feed_forward_part() -> None:
    host = moved("t5")
    layer = cast(Any, host.model).encoder.block[0].layer[1]
    core = cast(Bottleneck, of_kind(host, BesideDelta)[0].core)
    down, up = cast(nn.Linear, core.down), cast(nn.Linear, core.up)
    with torch.no_grad():
        down.bias.zero_()  # T5's own linears have none
        up.bias.zero_()
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    mlp = layer.DenseReluDense
    wide = torch.cat([mlp.wi.weight, down.weight])
    narrow = torch.cat([mlp.wo.weight, 4 * up.weight], 1)
    wanted = x + F.linear(F.relu(F.linear(layer.layer_norm(x), wide)), narrow)
    torch.testing.assert_close(layer(x), wanted)


def test_the_branch_of_a_post_norm_model_reads_what_the_feed_forward_reads() -> None:
    host = moved("bert", ffn_scale="learned")
    layer = cast(Any, host.model).bert.encoder.layer[0]
    core = of_kind(host, BesideDelta)[0].core
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with host.disabled():
        u = layer.output.dense(layer.intermediate(x))
        wanted = layer.output.LayerNorm(u + core(x) + x)
    torch.testing.assert_close(layer.feed_forward_chunk(x), wanted)


def test_the_branch_is_not_dropped_by_the_base() -> None:
    host = moved("bert")
    layer = cast(Any, host.model).bert.encoder.layer[0]
    layer.output.dropout.p = 1.0
    layer.output.train()
    core = of_kind(host, BesideDelta)[0].core
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    wanted = F.layer_norm(core(x) + x, (32,), eps=layer.output.LayerNorm.eps)
    torch.testing.assert_close(layer.feed_forward_chunk(x), wanted)


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("insertion", ["parallel", "sequential"])
def test_a_pre_norm_block_by_hand(raw: bool, insertion: Any) -> None:
    host = moved("llama", pre_ln_input=raw, ffn_insertion=insertion)
    block = cast(Any, host.model).model.layers[0]
    core = next(d.core for _, d in host.deltas() if hasattr(d, "core"))
    r = torch.randn(2, 5, 32, dtype=torch.float64)
    block.self_attn.forward = lambda **_: (torch.zeros_like(r), None)
    with host.disabled():
        x = block.post_attention_layernorm(r)
        u = block.mlp(x)
    seen = u if insertion == "sequential" else r if raw else x
    torch.testing.assert_close(first(block(r)), r + u + core(seen))


@pytest.mark.parametrize("layernorm", ["none", "in", "out"])
@pytest.mark.parametrize("function", ["relu", "linear"])
def test_norms_and_functions_of_the_branch(layernorm: Any, function: Any) -> None:
    host = moved("gpt2", ffn_layernorm=layernorm, ffn_function=function)
    core = cast(Bottleneck, of_kind(host, BesideDelta)[0].core)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    h = x if core.ln_in is None else core.ln_in(x)
    h = core.down(h)
    h = 4 * core.up(F.relu(h) if function == "relu" else h)
    torch.testing.assert_close(core(x), h if core.ln_out is None else core.ln_out(h))
    assert [core.ln_in is not None, core.ln_out is not None] == [
        layernorm == "in",
        layernorm == "out",
    ]


def test_the_dropout_is_the_models() -> None:
    model = tiny.bert()
    model.config.hidden_dropout_prob = 0.25
    host = Host(model)
    host.add(ParallelAdapter(ffn_r=4))
    assert of_kind(host, BesideDelta)[0].core.inner_dropout == 0.25


# -- attention -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "before"), [("parallel", True), ("parallel", False), ("sequential", True)]
)
def test_the_attentions_bottleneck_stands_before_or_behind_its_output(
    kind: Any, before: bool
) -> None:
    host = moved("llama", ffn_r=0, attn_kind=kind, attn_before_out_proj=before)
    attention = cast(Any, host.model).model.layers[0].self_attn
    core = next(d.core for _, d in host.deltas() if hasattr(d, "core"))
    assert core.ln_in is not None
    x = torch.randn(1, 5, 32, dtype=torch.float64)
    position = cast(Any, host.model).model.rotary_emb(x, torch.arange(5)[None])
    call = {"position_embeddings": position, "attention_mask": None}
    with host.disabled():
        y = first(attention(x, **call))
        reads = y if kind == "sequential" else x
        beside = before and kind == "parallel"
        wanted = y + (attention.o_proj(core(x)) if beside else core(reads))
    torch.testing.assert_close(first(attention(hidden_states=x, **call)), wanted)


@pytest.mark.parametrize("model", ["gpt2", "bert", "t5"])
@pytest.mark.parametrize("kind", ["cross_attn_noln", "cross_attn", "cross_attn_relu"])
def test_every_head_gets_its_own_change(model: str, kind: Any) -> None:
    host = moved(model, ffn_r=0, attn_kind=kind)
    delta = of_kind(host, HeadsDelta)[0]
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    site = delta.q[0]
    W, b = site.weight, getattr(site.module, "bias", None)
    b = None if b is None else b[:32]  # the rows of q come first in c_attn
    h = x if kind == "cross_attn_noln" else F.layer_norm(
        x, (32,), delta.norm.weight, delta.norm.bias
    )  # fmt: skip
    q = F.linear(h, W, b)
    wanted = []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        scores = q[..., part] @ delta.P_k[:, part].T
        scale = 1.0 if model == "t5" else 8**-0.5
        weights = scores.relu() if kind == "cross_attn_relu" else (scale * scores).softmax(-1)
        wanted.append(weights @ delta.P_v[:, part])
    torch.testing.assert_close(delta.change(delta.queries(x)), torch.cat(wanted, -1))


class Core(nn.Module):
    """An attention without projections, behind a prefix P_k, P_v (P, D)."""

    is_causal = True

    def __init__(self, P_k: Tensor, P_v: Tensor) -> None:
        super().__init__()
        prefix = PrefixDelta(*P_k.shape)
        prefix.W = nn.Parameter(torch.cat([P_k, P_v], 1))
        graft(self, "default", prefix)


def gated(
    q: Tensor, K: Tensor, V: Tensor, P_k: Tensor, P_v: Tensor, seen: Tensor
) -> tuple[Tensor, Tensor]:
    """(1 - l) attention + l softmax(q P_k') P_v, and l; only tokens are `seen` or not."""
    scores, of_prefix = (q @ K.T).masked_fill(~seen, -torch.inf), q @ P_k.T
    mine = of_prefix.exp().sum(-1, keepdim=True)
    gate = mine / (mine + scores.exp().sum(-1, keepdim=True))
    return (1 - gate) * scores.softmax(-1) @ V + gate * of_prefix.softmax(-1) @ P_v, gate


def test_the_gated_sum_is_the_concatenation() -> None:
    q, K = torch.tensor([[1.0, 0.0]]), torch.eye(2)
    V = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    P_k, P_v = torch.tensor([[0.5, 0.5]]), torch.tensor([[10.0, 20.0]])
    wanted, gate = gated(q, K, V, P_k, P_v, torch.ones(1, 2, dtype=torch.bool))
    assert gate.item() == pytest.approx(0.307196, abs=1e-6)
    torch.testing.assert_close(wanted, torch.tensor([[4.137410, 7.902173]]))
    ours, _ = packed_rows(Core(P_k, P_v), *(t[None, None] for t in (q, K, V)), None, scaling=1.0)
    torch.testing.assert_close(ours[0, :, 0], wanted)


def test_a_gated_sum_of_heads_is_trained_as_the_concatenation() -> None:
    given = []
    for fields in ({"attn_kind": "concat"}, {"attn_composition": "gate_add"}):
        host = moved("bert", **{"attn_kind": "cross_attn_noln", **fields})
        given.append(host.model(**tiny.batch("bert")).logits)
    assert torch.equal(*given)
    with pytest.raises(ConfigError, match="attn_kind=concat or cross_attn_noln, not with cross"):
        ParallelAdapter(attn_kind="cross_attn_relu", attn_composition="gate_add")


@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_hides_tokens_and_never_the_prefix(padded: bool) -> None:
    torch.manual_seed(0)
    q, K, V, P = torch.randn(4, 6, 3, dtype=torch.float64)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    if padded:
        seen[:, :2] = False  # two tokens of padding on the left; they see the prefix alone
    wanted, gate = gated(q, K, V, P[:2], P[2:4], seen)
    assert torch.equal(gate[:2] == 1, torch.full((2, 1), padded))
    mask = seen[None, None] if padded else None
    core, heads = Core(P[:2], P[2:4]), (t[None, None] for t in (q, K, V))
    ours, _ = packed_rows(core, *heads, mask, scaling=1.0)
    torch.testing.assert_close(ours[0, 2 * padded :, 0], wanted[2 * padded :])


@pytest.mark.parametrize("model", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize("kind", ATTENTION)
def test_every_attention_entry_trains(model: str, kind: Any) -> None:
    torch.manual_seed(2)
    host = Host(tiny.models()[model]())
    base = host.model(**tiny.batch(model)).logits
    host.add(ParallelAdapter(ffn_r=16, attn_kind=kind, attn_r=8, pre_ln_input=kind == "parallel"))
    y = host.model(**tiny.batch(model))
    assert not torch.equal(y.logits, base)
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.1 * torch.randn_like(p))
    host.model(**tiny.batch(model)).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in host.trained().values())
    if model in ("llama", "gpt2", "t5"):
        ids = tiny.batch(model)["input_ids"]
        generate = cast(Any, host.model.eval()).generate
        cached, fresh = (generate(ids, max_new_tokens=4, use_cache=c) for c in (True, False))
        assert torch.equal(cached, fresh)


@pytest.mark.parametrize("kind", ["none", *ATTENTION])
def test_a_padded_token_changes_no_other(kind: Any) -> None:
    host = moved("bert", attn_kind=kind)
    batch = {k: v for k, v in tiny.batch("bert").items() if k != "labels"}
    batch["attention_mask"][:, -2:] = 0
    y = host.model(**batch).logits
    batch["input_ids"][:, -2:] = 7
    torch.testing.assert_close(host.model(**batch).logits, y)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="leave nothing to train"):
        Host(tiny.bert()).add(ParallelAdapter(ffn_r=0))
    assert issubclass(NotApplicable, ConfigError)
