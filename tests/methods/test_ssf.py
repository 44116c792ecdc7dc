"""What the SSF paper promises: worked numbers, counts, folding into every kind of operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
)

from peftcli.core import weights
from peftcli.core.host import Host
from peftcli.core.layer import Bare
from peftcli.core.merge import readers
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.export.publish import declare_biases
from peftcli.methods.ssf import SSF, SSFDelta
from peftcli.models.load import empty_model
from tests import tiny


def delta_on(
    module: nn.Module, std: float = 0.5, scale: bool = True, shift: bool = True
) -> SSFDelta:
    d_out, d_in = weights.shape(module)
    return SSFDelta(Site("m", module, "linear", d_in, d_out), scale, shift, std)


def test_the_worked_example() -> None:
    linear = nn.Linear(2, 2).requires_grad_(False)
    linear.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    linear.bias.fill_(1.0)
    delta = delta_on(linear)
    delta.gamma.data, delta.beta.data = torch.tensor([2.0, 0.5]), torch.tensor([0.0, 1.0])
    layer = Bare(linear, nn.Linear)
    assert layer(torch.ones(2)).tolist() == [4.0, 8.0]
    assert delta(torch.ones(2), layer).tolist() == [8.0, 5.0]
    W, b = delta.merged(linear.weight, linear.bias)
    assert W.tolist() == [[2.0, 4.0], [1.5, 2.0]]
    assert b.tolist() == [2.0, 1.5]


def test_parameters_of_vit_base() -> None:
    host = Host(empty_model(ViTConfig(), "image_classification"))
    host.add(SSF())
    assert host.num_parameters()[0] == 205_824
    assert not any(site.path == "classifier" for site in host.sites["default"])


SWIN = SwinConfig(
    image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2
)
CONVNEXT = ConvNextConfig(
    image_size=16, patch_size=2, num_stages=2, hidden_sizes=[8, 16], depths=[1, 1]
)


@pytest.mark.parametrize(
    ("cls", "config", "names"),
    [
        (
            SwinForImageClassification,
            SWIN,
            "projection norm layernorm_before layernorm_after q_proj o_proj fc1 fc2 reduction",
        ),
        (
            ConvNextForImageClassification,
            CONVNEXT,
            "patch_embeddings layernorm dwconv pwconv1 pwconv2 downsampling_layer",
        ),
    ],
    ids=["swin", "convnext"],
)
def test_every_operation_of_other_vision_models_has_a_pair_that_folds(
    cls: type[PreTrainedModel], config: PreTrainedConfig, names: str
) -> None:
    """Patch embeddings, mergings and down-samplings too; all but the head."""
    torch.manual_seed(0)
    model = cls(config).eval()
    host = Host(model)
    operations = nn.Linear, nn.Conv2d, nn.LayerNorm
    wanted = {p for p, m in model.named_modules() if isinstance(m, operations)} - {"classifier"}
    host.add(SSF(init_std=0.2))
    assert {site.path for site in host.sites["default"]} == wanted
    assert all(any(name in path for path in wanted) for name in names.split())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        apart = model(x).logits
        host.merge()
        torch.testing.assert_close(model(x).logits, apart, atol=1e-5, rtol=1e-4)
        host.unmerge()
    host.remove("default")
    base = model(x).logits
    host.add(SSF(init="identity"))
    torch.testing.assert_close(model(x).logits, base)


def test_parameters_of_vit_base_with_a_fresh_head_of_100_classes() -> None:
    labels = tuple(map(str, range(100)))
    host = Host(empty_model(ViTConfig(), "image_classification", labels), ["classifier"])
    host.add(SSF())
    assert host.num_parameters()[0] == 205_824 + 76_900


@pytest.mark.parametrize("model", sorted(tiny.models()))
def test_the_identity_start_is_the_base(model: str) -> None:
    host = Host(tiny.models()[model]())
    host.add(SSF(init="identity"))
    batch = tiny.batch(model)
    base = tiny.models()[model]()(**batch).logits
    torch.testing.assert_close(host.model(**batch).logits, base)


def test_the_random_start_has_deviation_two_hundredths() -> None:
    delta = SSF().build(Site("m", nn.Linear(1, 4096), "linear", 1, 4096))
    for values, mean in ((delta.gamma, 1.0), (delta.beta, 0.0)):
        assert values.mean().item() == pytest.approx(mean, abs=2e-3)
        assert values.std().item() == pytest.approx(0.02, rel=0.05)


def used_batch_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(4)
    norm(torch.randn(8, 4, 5, 5) * 3 + 1)
    return norm.eval()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(4, 6), (2, 3, 4)),
        (lambda: nn.Linear(4, 6, bias=False), (2, 3, 4)),
        (lambda: nn.Conv2d(4, 6, 3), (2, 4, 5, 5)),
        (lambda: nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 5, 5)),
        (lambda: nn.Conv1d(4, 6, 3), (2, 4, 5)),
        (lambda: nn.LayerNorm(4), (2, 3, 4)),
        (lambda: nn.LayerNorm(4, bias=False), (2, 3, 4)),
        (lambda: nn.GroupNorm(2, 4), (2, 4, 5, 5)),
        (used_batch_norm, (2, 4, 5, 5)),
    ],
    ids="linear bare-linear conv grouped conv1d layernorm bare-layernorm groupnorm bn".split(),
)
def test_scale_and_shift_fold_into_the_operation(make: object, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = make().requires_grad_(False)
    layer, delta = Bare(module, type(module)), delta_on(module)
    x = torch.randn(shape)
    y = delta(x, layer)
    W, b = delta.merged(layer.weight, layer.bias)
    torch.testing.assert_close(layer.linear(x, W, b), y, atol=1e-5, rtol=1e-5)
    weights.write(module, W, b)
    torch.testing.assert_close(module(x), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_a_shift_behind_a_norm_folds_into_the_linears_that_read_it(bias: bool) -> None:
    """b'' = b + W beta, on Llama without and with biases in its linears."""
    config = tiny.models()["llama"]().config
    config.attention_bias = config.mlp_bias = bias
    torch.manual_seed(0)
    host = Host(LlamaForCausalLM(config).eval())
    base = {n: p.clone() for n, p in host.model.named_parameters()}
    host.add(SSF(target_modules=("backbone", ".*layernorm"), init_std=0.3))
    assert host.matched["default"][".*layernorm"] == 2 * config.num_hidden_layers
    apart, merged = logits_moved_and_merged(host, "llama")
    torch.testing.assert_close(merged, apart, atol=1e-5, rtol=1e-5)
    assert host.model.model.layers[0].self_attn.q_proj.bias.abs().max() > 0.1
    assert not hasattr(host.model.model.layers[0].input_layernorm, "bias")
    declare_biases(host)
    host.unmerge()
    assert all(torch.equal(p, base[n]) for n, p in host.model.named_parameters() if n in base)


def test_a_shift_with_no_place_is_refused_when_merging() -> None:
    """Llama's head has no bias in its configuration."""
    host = Host(tiny.models()["llama"]())
    host.add(SSF())
    host.merge()
    with pytest.raises(ConfigError, match=r"lm_head\.bias"):
        declare_biases(host)


def test_a_norm_that_more_than_linears_read_keeps_its_shift() -> None:
    model = tiny.models()["llama"]()
    assert readers(model, ["model.norm"]) == {"model.norm": ["lm_head"]}
    states: list[Tensor] = []
    model.model.register_forward_hook(lambda m, args, out: states.append(out[0]))
    model.register_forward_hook(lambda m, args, out: (out[0] + states[-1].sum(-1, keepdim=True),))
    with pytest.raises(ConfigError, match=r"more than the linears.*lm_head"):
        readers(model, ["model.norm"])
    with pytest.raises(ConfigError, match="which no linear reads"):
        readers(model, ["model.layers.0.mlp"])


def test_gradients_are_sums_over_tokens() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(4, 6).double()
    delta = delta_on(linear).double()
    x, g = torch.randn(2, 7, 4).double(), torch.randn(2, 7, 6).double()
    delta(x, Bare(linear, nn.Linear)).backward(g)
    torch.testing.assert_close(delta.beta.grad, g.sum((0, 1)))
    torch.testing.assert_close(delta.gamma.grad, (g * linear(x)).sum((0, 1)))


@pytest.mark.parametrize(("scale", "shift"), [(True, False), (False, True)])
def test_either_half_alone(scale: bool, shift: bool) -> None:
    host = Host(tiny.models()["vit"]())
    host.add(SSF(ssf_scale=scale, ssf_shift=shift))
    whole = Host(tiny.models()["vit"]())
    whole.add(SSF())
    assert 2 * host.num_parameters()[0] == whole.num_parameters()[0]
    moved = logits_moved_and_merged(host, "vit")
    torch.testing.assert_close(*moved, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def logits_moved_and_merged(host: Host, model: str) -> tuple[Tensor, Tensor]:
    for p in host.trained().values():
        p.add_(0.1 * torch.randn_like(p))
    apart = host.model(**tiny.batch(model)).logits
    host.merge()
    return host.model(**tiny.batch(model)).logits, apart


def test_scales_alone_merge_into_llama_and_into_the_shifted_weights_of_gemmas_norms() -> None:
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    for model in (tiny.models()["llama"](), GemmaForCausalLM(config).eval()):
        host = Host(model)
        base = {n: p.clone() for n, p in model.named_parameters()}
        host.add(SSF(ssf_shift=False))
        torch.testing.assert_close(*logits_moved_and_merged(host, "llama"), atol=1e-5, rtol=1e-5)
        host.unmerge()
        assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_a_module_trained_whole_gets_no_scale() -> None:
    host = Host(tiny.models()["vit"](), ["vit.layers.1.mlp"])
    host.add(SSF())
    assert not any(s.path.startswith("vit.layers.1.mlp") for s in host.sites["default"])


def test_neither_scale_nor_shift_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is left"):
        Host(tiny.models()["vit"]()).add(SSF(ssf_scale=False, ssf_shift=False))
