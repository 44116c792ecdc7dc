"""What the IA3 paper promises: worked numbers, counts, places, and peft's files both ways."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, T5Config

from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.export import adapter
from peftcli.methods.ia3 import IA3, InputScale, OutputScale
from peftcli.models.load import empty_model
from tests import tiny


def site_of(module: nn.Module) -> Site:
    d_out, d_in = weights.shape(module)
    kind, groups = weights.kind_of(module), getattr(module, "groups", 1)
    return Site("m", module, kind, d_in, d_out, groups=groups)


def toy() -> nn.Linear:
    linear = nn.Linear(2, 2, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    return linear


@pytest.mark.parametrize(("cls", "wanted"), [(OutputScale, [6.0, 3.5]), (InputScale, [3.0, 8.0])])
def test_the_worked_example(cls: type, wanted: list[float]) -> None:
    linear = toy()
    delta = cls(site_of(linear))
    delta.l.data = torch.tensor([2.0, 0.5])
    y = delta(torch.ones(2), Bare(linear, nn.Linear))
    assert y.tolist() == wanted
    W, b = delta.merged(linear.weight, None)
    assert b is None
    assert (W @ torch.ones(2)).tolist() == wanted


@pytest.mark.parametrize("cls", [OutputScale, InputScale])
@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 6),
        nn.Linear(4, 6, bias=False),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.Conv1d(4, 6, 3),
    ],
    ids=["linear", "no-bias", "conv", "grouped", "1d"],
)
def test_scales_fold_with_and_without_a_bias(cls: type, module: nn.Module) -> None:
    torch.manual_seed(0)
    layer, delta = Bare(module, type(module)), cls(site_of(module))
    nn.init.normal_(delta.l)
    x = torch.randn(2, 4, *[5] * len(getattr(module, "kernel_size", ())))
    folded = layer.linear(x, *delta.merged(layer.weight, layer.bias))
    torch.testing.assert_close(folded, delta(x, layer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("d_model", "d_ff", "heads", "count"), [(2048, 5120, 32, 540_672), (4096, 10240, 64, 1_081_344)]
)
def test_parameters_of_t0(d_model: int, d_ff: int, heads: int, count: int) -> None:
    config = T5Config(
        d_model=2048 if heads == 32 else 4096,
        d_kv=64,
        num_heads=heads,
        d_ff=d_ff,
        num_layers=24,
        feed_forward_proj="gated-gelu",
    )
    assert config.d_model == d_model
    host = Host(empty_model(config, "seq2seq"))
    host.add(IA3())
    assert host.num_parameters()[0] == count


def test_parameters_of_llama_2_7b() -> None:
    host = Host(empty_model(LlamaConfig(intermediate_size=11008), "causal_lm"))
    host.add(IA3())
    assert host.num_parameters()[0] == 614_400


def test_two_adapters_multiply() -> None:
    host = Host(tiny.models()["llama"]())
    for name, factor in (("default", 2.0), ("second", 0.25), ("both", 0.5)):
        host.add(IA3(), name)
        with torch.no_grad():
            for _, delta in host.deltas(name):
                delta.l.fill_(factor)
    batch = tiny.batch("llama")
    host.activate("both")
    wanted = host.model(**batch).logits
    host.activate("default", "second")
    torch.testing.assert_close(host.model(**batch).logits, wanted)


def test_only_the_feed_forward_is_scaled_at_its_input() -> None:
    host = Host(tiny.models()["llama"]())
    host.add(IA3())
    kinds = {site.role: type(delta) for site, delta in host.deltas()}
    assert kinds == {"k": OutputScale, "v": OutputScale, "down": InputScale}


def test_a_common_factor_of_the_keys_of_a_head_sharpens_its_attention() -> None:
    host = Host(tiny.models()["llama"]())
    host.add(IA3(target_modules=("k",), feedforward_modules=()))
    with torch.no_grad():
        for _, delta in host.deltas():
            delta.l.fill_(2.0)
    batch = tiny.batch("llama")
    scaled = host.model(**batch).logits
    host.activate()
    for path in host.layout.attention_cores:
        host.model.get_submodule(path).scaling *= 2  # rotary positions commute with the factor
    torch.testing.assert_close(host.model(**batch).logits, scaled, atol=1e-5, rtol=1e-5)


def test_fused_roles_of_gpt2_cost_only_their_rows_and_export_as_ones_elsewhere() -> None:
    host = Host(tiny.models()["gpt2"]())
    host.add(IA3(target_modules=("k", "v"), feedforward_modules=()))
    assert host.num_parameters()[0] == 2 * (32 + 32)
    with torch.no_grad():
        for _, delta in host.deltas():
            delta.l.fill_(3.0)
    first = host.adapters["default"].hf_tensors(host, "default")[
        "transformer.h.0.attn.c_attn.ia3_l"
    ]
    assert first[:, 0].tolist() == [1.0] * 32 + [3.0] * 64


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("model", "targets", "inputs"),
    [
        ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
        ("gpt2", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
        ("bert", ["key", "value", "output.dense"], ["output.dense"]),
        ("t5", ["k", "v", "wo"], ["wo"]),
        ("vit", ["q_proj", "projection"], []),
    ],
)
def test_an_adapter_made_by_peft_computes_the_same_here(
    model: str, targets: list[str], inputs: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = peft.IA3Config(
        target_modules=targets, feedforward_modules=inputs, init_ia3_weights=False
    )
    theirs = peft.get_peft_model(tiny.models()[model](), config).eval()
    theirs.save_pretrained(tmp_path)
    host = Host(tiny.models()[model]())
    adapter.load(host, tmp_path)
    batch = tiny.batch(model)
    with torch.no_grad():
        wanted, given = theirs(**batch).logits, host.model(**batch).logits
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_last_name_that_means_both_kinds_is_exported_by_whole_paths(tmp_path: Path) -> None:
    host = Host(tiny.models()["bert"](), ["classifier"])
    host.add(IA3(target_modules="all-linear", feedforward_modules=("down",)))
    with torch.no_grad():
        for _, delta in host.deltas():
            delta.l.normal_(1.0, 0.3)
    adapter.save(host, "default", tmp_path, "classification", "base")
    theirs = peft.PeftModel.from_pretrained(tiny.models()["bert"](), tmp_path).eval()
    batch = tiny.batch("bert")
    with torch.no_grad():
        ours, stock = host.model(**batch).logits, theirs(**batch).logits
    torch.testing.assert_close(stock, ours, atol=1e-5, rtol=1e-4)


def test_a_feed_forward_entry_that_is_no_target_is_refused() -> None:
    host = Host(tiny.models()["llama"]())
    with pytest.raises(ConfigError, match="'down' is none of the targets"):
        host.add(IA3(target_modules=("k", "v")))
    assert not host.adapters


def test_an_embedding_is_refused() -> None:
    host = Host(tiny.models()["llama"]())
    with pytest.raises(ConfigError, match="is an embedding"):
        host.add(IA3(target_modules=("embed", "down")))
