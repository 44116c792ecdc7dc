"""What the adapters' papers promise: wirings, worked numbers, starts, counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BartConfig, BertConfig, GPTJConfig, GPTJForCausalLM, T5Config
from transformers.models.bart.modeling_bart import BartForConditionalGeneration

from peftcli.core.host import Host
from peftcli.core.sublayer import find_sublayers
from peftcli.errors import ConfigError, NotApplicable
from peftcli.export import adapter
from peftcli.methods.adapter import AdapterDelta, Bottleneck, projections
from peftcli.methods.bottleneck_adapter import BottleneckAdapter
from peftcli.models.load import empty_model
from tests import tiny

BERT = BertConfig()
BERT_LARGE = BertConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
)
T5 = T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12)


BASES = {  # without a head
    "bert": 109_482_240,
    "bert-large": 335_141_888,
    "t5": 222_903_552,
}


def host_of(model: str, **fields: Any) -> Host:
    """A tiny model in float64 under adapters that are far off their start."""
    torch.manual_seed(3)
    host = Host(tiny.models()[model]())
    host.add(BottleneckAdapter(bottleneck_dim=5, **fields))
    with torch.no_grad():
        for n, p in host.model.named_parameters():
            if ".deltas." in n or "norm" in n.lower():
                p.add_(0.3 * torch.randn_like(p))
    host.model.double()
    return host


def core_at(host: Host, index: int) -> Bottleneck:
    """The branch of the adapter number `index`."""
    cores = [d.core for _, d in host.deltas() if hasattr(d, "core")]
    return cast(Bottleneck, cores[index])


def test_the_worked_example() -> None:
    down, up = projections(2, 1, "lora")
    core = Bottleneck(2, down, up, "relu")
    with torch.no_grad():
        down.weight.copy_(torch.tensor([[0.5, -0.5]]))
        down.bias.fill_(0.1)
        up.weight.copy_(torch.tensor([[2.0], [-1.0]]))
        up.bias.copy_(torch.tensor([0.0, 0.5]))
    x = torch.tensor([[1.0, -2.0]])
    torch.testing.assert_close(core(x), torch.tensor([[3.2, -1.1]]))
    torch.testing.assert_close(AdapterDelta(core).edit(x, x), torch.tensor([[4.2, -3.1]]))


@pytest.mark.parametrize(
    ("base", "fields", "wanted", "percent"),
    [
        ("bert", {"bottleneck_dim": 64}, (2_379_264, 38_400, 24), 2.208),
        ("bert-large", {"bottleneck_dim": 64}, (6_343_680, 100_352, 48), 1.923),
        ("bert", {"preset": "pfeiffer"}, (894_528, 0, 12), 0.817),
        ("t5", {"bottleneck_dim": 24}, (1_855_104 - 47_616, 47_616, 48), 0.832),
        (
            "t5",
            {"bottleneck_dim": 24, "positions": ("ffn",)},
            (951_360 - 47_616, 47_616, 24),
            0.427,
        ),
        (  # AdapterDrop: the upper seven layers of both stacks
            "t5",
            {"bottleneck_dim": 24, "leave_out": (0, 1, 2, 3, 4)},
            (1_101_984 - 47_616, 47_616, 28),
            0.494,
        ),
    ],
    ids=["bert", "bert-large", "pfeiffer", "t5", "t5-ffn", "adapterdrop"],
)
def test_counts_of_the_papers(
    base: str, fields: Any, wanted: tuple[int, int, int], percent: float
) -> None:
    """(deltas, norms, adapters) on a model without weights."""
    config = {"bert": BERT, "bert-large": BERT_LARGE, "t5": T5}[base]
    host = Host(empty_model(config, "seq2seq" if base == "t5" else "classification"))
    named = host.model.named_parameters()
    assert sum(p.numel() for n, p in named if not n.startswith("classifier")) == BASES[base]
    host.add(BottleneckAdapter(**fields))
    sizes = {n: p.numel() for n, p in host.trained().items()}
    mine = sum(size for n, size in sizes.items() if ".deltas." in n)
    assert (mine, sum(sizes.values()) - mine, len(host.sites["default"])) == wanted
    assert round(100 * sum(sizes.values()) / BASES[base], 3) == percent


@pytest.mark.parametrize("model", sorted(tiny.models()))
@pytest.mark.parametrize("preset", ["houlsby", "pfeiffer", "adapter_plus"])
def test_lora_init_starts_at_the_base_bit_for_bit(model: str, preset: Any) -> None:
    host = Host(tiny.models()[model]())
    base = host.model(**tiny.batch(model)).logits
    host.add(BottleneckAdapter(preset=preset, init="lora", residual_before_ln=None))
    if model == "bert" and preset == "pfeiffer":  # LN(LN-free sum): the outer norm sees u + r
        assert host.sites["default"][0].kind == "norm"
    assert torch.equal(host.model(**tiny.batch(model)).logits, base)


def test_starts_have_the_papers_deviations() -> None:
    torch.manual_seed(0)
    down, up = projections(512, 256, "houlsby")
    assert down.weight.abs().max() <= 0.02
    assert up.weight.std().item() == pytest.approx(0.0088, rel=0.01)
    down, up = projections(512, 256, "bert")
    assert up.weight.std().item() == pytest.approx(0.02, rel=0.01)
    down, up = projections(512, 256, "lora")
    assert down.weight.abs().max() <= 512**-0.5
    assert not up.weight.any()
    assert not down.bias.any()


# -- wirings by hand -------------------------------------------------------------------------------
def norm(x: Tensor, module: nn.Module) -> Tensor:
    m = cast(nn.LayerNorm, module)
    return F.layer_norm(x, x.shape[-1:], m.weight, m.bias, m.eps)


WIRINGS: dict[str, tuple[dict[str, Any], Any]] = {
    "houlsby": ({"preset": "houlsby"}, lambda u, r, c, n: n(u + c(u) + r)),
    "pfeiffer": ({"preset": "pfeiffer"}, lambda u, r, c, n: n(c(n(u + r)) + u + r)),
    "adapter_plus": ({"preset": "adapter_plus"}, lambda u, r, c, n: c(n(u + r)) + n(u + r)),
    "post_add": (
        {"preset": "adapter_plus", "residual_before_ln": "post_add"},
        lambda u, r, c, n: c(n(u + r)) + u + r,
    ),
}


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("position", ["attn", "ffn"])
def test_a_post_norm_model_is_wired_as_by_hand(wiring: str, position: Any) -> None:
    fields, by_hand = WIRINGS[wiring]
    host = host_of("bert", positions=(position,), **fields)
    layer = cast(Any, host.model).bert.encoder.layer[0]
    part = layer.output if position == "ffn" else layer.attention.output
    h = torch.randn(2, 7, part.dense.in_features, dtype=torch.float64)
    r = torch.randn(2, 7, 32, dtype=torch.float64)
    u = F.linear(h, part.dense.weight, part.dense.bias)
    wanted = by_hand(u, r, core_at(host, 0), lambda x: norm(x, part.LayerNorm))
    torch.testing.assert_close(part(h, r), wanted)


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("position", ["attn", "ffn"])
def test_a_pre_norm_block_is_wired_as_by_hand(wiring: str, position: Any) -> None:
    fields, by_hand = WIRINGS[wiring]
    host = host_of("gpt2", positions=(position,), **fields)
    block = cast(Any, host.model).transformer.h[0]
    core = core_at(host, 0)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    got = block(x)
    with host.disabled():
        h = x
        for kind, n, part in (("attn", block.ln_1, block.attn), ("ffn", block.ln_2, block.mlp)):
            u = part(n(h))
            u = u[0] if isinstance(u, tuple) else u
            h = by_hand(u, h, core, lambda v: v) if kind == position else u + h
    torch.testing.assert_close(got, h)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_sublayers_of_t5_are_wired_as_by_hand(index: int) -> None:
    host = host_of("t5", preset="pfeiffer", positions=("attn", "cross", "ffn"))
    layer = cast(Any, host.model).decoder.block[0].layer[index]
    core = core_at(host, 4 + index)  # behind the encoder's four
    x, memory = torch.randn(2, 2, 7, 32, dtype=torch.float64)
    args = {1: {"key_value_states": memory}}.get(index, {})
    got = layer(x, **args)
    with host.disabled():
        v = layer(x, **args)
    got, v = (y[0] if isinstance(y, tuple) else y for y in (got, v))
    torch.testing.assert_close(got, v + core(v))


def test_bart_pairs_every_sublayer_with_the_norm_behind_it() -> None:
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
    )  # fmt: skip
    host = Host(BartForConditionalGeneration(config))
    pairs = [
        (s.kind, s.end.path.split(".", 4)[-1], s.norm and s.norm.path.split(".")[-1])
        for s in find_sublayers(host.model, host.layout)
    ]
    assert pairs == [
        ("attn", "self_attn.out_proj", "self_attn_layer_norm"),
        ("ffn", "fc2", "final_layer_norm"),
        ("attn", "self_attn.out_proj", "self_attn_layer_norm"),
        ("cross", "encoder_attn.out_proj", "encoder_attn_layer_norm"),
        ("ffn", "fc2", "final_layer_norm"),
    ]


def test_a_shared_sum_leaves_the_feed_forward_without_a_residual() -> None:
    config = GPTJConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=8)
    torch.manual_seed(0)
    host = Host(GPTJForCausalLM(config).eval())
    host.add(BottleneckAdapter(preset="pfeiffer", init="bert"))
    mlp = cast(Any, host.model).transformer.h[0].mlp
    x = torch.randn(1, 3, 32)
    with host.disabled():
        u = mlp(x)
    torch.testing.assert_close(mlp(x), u + core_at(host, 0)(u))


# -- options ---------------------------------------------------------------------------------------
def test_adapter_plus_is_the_papers_default() -> None:
    host = Host(tiny.vit())
    host.add(BottleneckAdapter(preset="adapter_plus", reduction_factor=4))
    core = core_at(host, 0)
    assert cast(Any, core.down).weight.shape == (8, 32)
    assert torch.equal(cast(Tensor, core.scale), torch.ones(32))
    assert core.drop_path == 0.1


def test_drop_path_drops_whole_examples_and_keeps_the_mean() -> None:
    down, up = projections(4, 2, "bert")
    core = Bottleneck(4, down, up, "gelu", drop_path=0.25).train()
    torch.manual_seed(0)
    x = torch.randn(1, 3, 4).expand(2000, 3, 4)
    y = core(x)
    kept = y.flatten(1).abs().sum(1) > 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(y[kept], core.eval()(x)[kept] / 0.75)


def test_dropout_is_on_the_scaled_branch_and_only_while_training() -> None:
    host = Host(tiny.bert())
    host.add(BottleneckAdapter(dropout=0.5, scale="channel", ln_out=False))
    core, x = core_at(host, 0), torch.randn(64, 3, 32)
    whole, part = core.eval()(x), core.train()(x)
    assert 0.45 < (part == 0).float().mean().item() < 0.55
    torch.testing.assert_close(part[part != 0], 2 * whole[part != 0])


def test_a_learned_scale_is_one_number_that_starts_at_one() -> None:
    host = Host(tiny.bert())
    host.add(BottleneckAdapter(scale="learned", train_layernorm=False))
    assert torch.equal(cast(Tensor, core_at(host, 0).scale), torch.ones(1))


def test_a_fixed_scale_multiplies_the_branch() -> None:
    down, up = projections(4, 2, "bert")
    x = torch.randn(1, 3, 4)
    one, four = (Bottleneck(4, down, up, "relu", scale=s) for s in (1.0, 4.0))
    torch.testing.assert_close(four(x), 4 * one(x))


def test_new_norms_stand_before_and_behind_the_branch() -> None:
    down, up = projections(6, 3, "bert")
    core = Bottleneck(6, down, up, "relu", ln_in=True, ln_out=True)
    x = torch.randn(2, 3, 6)
    wanted = F.layer_norm(up(F.relu(down(F.layer_norm(x, (6,))))), (6,))
    torch.testing.assert_close(core(x), wanted)


def test_the_gate_is_one_number_an_example() -> None:
    down, up = projections(6, 3, "bert")
    core = Bottleneck(6, down, up, "relu", gate=True)
    assert core.gate is not None
    x = torch.randn(2, 3, 6)
    plain = up(F.relu(down(x)))
    g = torch.sigmoid(x @ core.gate.weight[0] + core.gate.bias).mean(1)
    torch.testing.assert_close(core(x), plain * g[:, None, None])


def test_a_gate_is_refused_where_tokens_are_generated() -> None:
    with pytest.raises(NotApplicable, match="while it generates"):
        Host(tiny.llama()).add(BottleneckAdapter(gate=True))
    Host(tiny.bert()).add(BottleneckAdapter(gate=True))


def test_reductions_by_layer() -> None:
    host = Host(tiny.llama())
    host.add(BottleneckAdapter(reduction_factor={"1": 2.0, "default": 8.0}, positions=("ffn",)))
    widths = [cast(Any, core_at(host, i).down).out_features for i in range(3)]
    assert widths == [4, 16, 4]
    with pytest.raises(ConfigError, match="add a default"):
        Host(tiny.llama()).add(BottleneckAdapter(reduction_factor={"1": 2.0}))


def test_a_bottleneck_is_never_narrower_than_one() -> None:
    assert BottleneckAdapter(reduction_factor=100.0).width(32, 0) == 1


def test_cross_attention_has_adapters_only_where_asked() -> None:
    for positions, cross in ((None, 0), (("cross",), 2)):
        host = Host(tiny.t5())
        host.add(BottleneckAdapter(positions=positions))
        assert sum("EncDecAttention" in s.path for s in host.sites["default"]) == cross


def test_layers_left_out_have_no_adapter() -> None:
    host = Host(tiny.llama())
    host.add(BottleneckAdapter(leave_out=(0, 2)))
    assert {s.layer for s in host.sites["default"]} == {1}
    with pytest.raises(NotApplicable, match="no attn or ffn sub-layer outside"):
        Host(tiny.llama()).add(BottleneckAdapter(leave_out=(0, 1, 2)))
    with pytest.raises(ConfigError, match=r"method.leave_out=\[3\].* from 0 to 2"):
        Host(tiny.llama()).add(BottleneckAdapter(leave_out=(0, 3)))


def test_a_residual_counted_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="counts the residual twice or not at all"):
        Host(tiny.bert()).add(BottleneckAdapter(preset="pfeiffer", residual_before_ln=False))


def test_a_step_moves_adapters_and_norms_alone() -> None:
    host = Host(tiny.t5())
    host.add(BottleneckAdapter())
    before = {n: p.clone() for n, p in host.model.named_parameters()}
    optimizer = torch.optim.AdamW(host.trained().values(), lr=1e-2)
    host.model(**tiny.batch("t5")).loss.backward()
    optimizer.step()
    moved = {n for n, p in host.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(host.trained())
    assert all(".deltas." in n or "norm" in n for n in moved)


@pytest.mark.parametrize("preset", ["pfeiffer", "adapter_plus"])
@pytest.mark.parametrize("model", ["bert", "gpt2", "t5"])
def test_every_wiring_is_published_and_read_back(preset: Any, model: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    host = Host(tiny.models()[model]())
    host.add(BottleneckAdapter(preset=preset, positions=("attn", "ffn"), train_layernorm=True))
    with torch.no_grad():
        for p in host.trained().values():
            p.add_(0.1 * torch.randn_like(p))
    wanted = host.model(**tiny.batch(model)).logits
    adapter.save(host, "default", tmp_path, "causal_lm", "base")
    again = Host(tiny.models()[model]())
    adapter.load(again, tmp_path)
    assert torch.equal(again.model(**tiny.batch(model)).logits, wanted)


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_lent_residual_survives_checkpointing_and_caches(model: str) -> None:
    host = Host(tiny.models()[model]())
    host.add(BottleneckAdapter(preset="pfeiffer", positions=("attn", "ffn")))

    def grads() -> list[Tensor]:
        host.model.train().zero_grad()
        host.model(**tiny.batch(model), use_cache=False).loss.backward()
        return [cast(Tensor, p.grad).clone() for p in host.trained().values()]

    ids = tiny.batch(model)["input_ids"]
    generate = cast(Any, host.model.eval()).generate
    cached, fresh = (generate(ids, max_new_tokens=4, use_cache=c) for c in (True, False))
    assert torch.equal(cached, fresh)
    plain = grads()
    host.recompute_activations()
    for a, b in zip(grads(), plain, strict=True):
        torch.testing.assert_close(a, b)
