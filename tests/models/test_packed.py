"""Checkpoints of GPTQ and AWQ: every layout means what it was written from, and nothing else is
taken for one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.packed import PackedLinear, Packing, unpack
from peftcli.errors import DataError, UserError
from peftcli.models import packed
from peftcli.models.load import load_model
from peftcli.models.quantise import refuse_stored
from peftcli.models.source import resolve
from peftcli.settings import Model
from tests import packer, tiny
from tests.packer import Written


def linear(written: Written, told: dict[str, Any], bias: bool = False) -> PackedLinear:
    """The layer that reads what was written, in float64's nearest."""
    d_out, d_in = written.W.shape
    tensors = written.tensors | ({"bias": torch.arange(float(d_out))} if bias else {})
    module = PackedLinear(packed.packing_of("m", told), d_in, d_out, tensors, torch.float32)
    module.settle()
    return module


def gptq(bits: int = 4, size: int = 16, layout: str = "gptq") -> dict[str, Any]:
    told = {"quant_method": "gptq", "bits": bits, "group_size": size}
    return told | {"checkpoint_format": layout}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM"}


@pytest.mark.parametrize("size", [16, -1, 24])  # runs; one; the last one shorter
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_means_what_it_was_written_from(bits: int, version: int, size: int) -> None:
    W = torch.randn(32, 64, generator=torch.Generator().manual_seed(bits))
    told = gptq(bits, size, "gptq" if version == 1 else "gptq_v2")
    for order in (None, torch.randperm(64, generator=torch.Generator().manual_seed(1))):
        written = packer.gptq(W, bits, size, version, order)
        found = linear(written, told)
        assert torch.equal(weights.dense(found).double(), written.W)
        assert (found.group_of is None) == (size != 24 and (order is None or size == -1))
        if order is None:  # some writers leave out what says nothing
            del written.tensors["g_idx"]
            assert torch.equal(weights.dense(linear(written, told)).double(), written.W)


def test_a_zero_point_of_0_in_the_first_version_borrows_from_its_neighbour() -> None:
    """1 is taken from all in a word at once: 0x50 (5 and 0) becomes 0x3f, and goes back."""
    written = packer.gptq(torch.randn(8, 32), 4, -1, version=2)
    meant = [0, 5, 1, 15, 0, 0, 8, 7]
    stored = packer.words([packer.stream(meant, 4)]) - 0x11111111
    assert int(stored) & 0xFF == 0x3F
    written.tensors["qzeros"] = stored
    assert linear(written, gptq(size=-1)).zeros.tolist() == [meant]


def test_awq_lays_eight_outputs_in_a_word_in_its_order() -> None:
    """By hand: outputs 0 to 7 hold 8 to 15, and lie as 8 a c e 9 b d f from the lowest bits on."""
    word = packer.words([[0xFDB9ECA8]])
    assert unpack(word.T, 4, packed.AWQ_ORDER).T.tolist() == [list(range(8, 16))]
    assert packer.interleaved(list(range(8, 16))) == [0xFDB9ECA8]


@pytest.mark.parametrize("size", [16, -1])
def test_awq_means_what_it_was_written_from(size: int) -> None:
    written = packer.awq(torch.randn(24, 48), size)
    found = linear(written, {**AWQ, "group_size": size})
    assert torch.equal(weights.dense(found).double(), written.W)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_product_and_its_gradient_are_those_of_the_dequantised_weight(kind: str) -> None:
    W, order = torch.randn(24, 48), torch.randperm(48)
    written = packer.awq(W, 16) if kind == "awq" else packer.gptq(W, 4, 16, order=order)
    module = linear(written, AWQ if kind == "awq" else gptq(), bias=True)
    x = torch.randn(2, 5, 48, requires_grad=True)
    dy = torch.randn(2, 5, 24)
    y = module(x)
    held = [t for t in y.grad_fn.next_functions[0][0].saved_tensors if t is not None]  # pyright: ignore
    assert {t.data_ptr() for t in held} <= {t.data_ptr() for t in own(module)}
    y.backward(dy)
    assert x.grad is not None
    torch.testing.assert_close(y, x @ written.W.float().T + torch.arange(24.0))
    torch.testing.assert_close(x.grad, dy @ written.W.float())
    assert not any(p.requires_grad for p in module.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        half = module(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, atol=0.2, rtol=0.05)


def own(module: PackedLinear) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def read(folder: Path, **options: Any) -> Any:
    cfg = Model(str(folder))
    options = {"dtype": torch.float32, **options}
    return load_model(resolve(cfg, folder / "cache"), cfg, "causal_lm", **options).model


@pytest.mark.parametrize("kind", ["gptq", "awq"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpoint_is_read_and_dequantised(name: str, kind: str, tmp_path: Path) -> None:
    order = {"order": True} if kind == "gptq" else {}
    means = packer.checkpoint(tmp_path, name, kind, **order)
    batch = {k: v for k, v in tiny.batch(name).items() if k != "labels"}
    model, plain = read(tmp_path), read(tmp_path, dequantised=True)
    found = {p for p, m in model.named_modules() if weights.is_quantised(m)}
    assert {f"{path}.weight".removeprefix("transformer.") for path in found} == {
        key.removeprefix("transformer.") for key in means
    }
    for path, W in zip(sorted(found), (means[k] for k in sorted(means)), strict=True):
        assert torch.equal(plain.get_parameter(f"{path}.weight").double(), W)
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    assert not any(weights.is_quantised(m) for m in plain.modules())
    assert not hasattr(plain.config, "quantization_config")
    assert model.config.to_dict()["quantization_config"]["quant_method"] == kind
    half = read(tmp_path, dtype=torch.bfloat16)
    path = next(iter(found))
    assert weights.dense(half.get_submodule(path)).dtype == torch.bfloat16
    assert half.get_submodule(path).scales.dtype == torch.float16


def test_biases_of_zeros_that_the_architecture_lacks_are_dropped(tmp_path: Path) -> None:
    packer.checkpoint(tmp_path, "llama", "gptq")
    file, path = tmp_path / "model.safetensors", "model.layers.{}.mlp.up_proj"
    tensors = load_file(file)
    tensors |= {f"{path.format(i)}.bias": torch.full((48,), float(i)) for i in range(2)}
    save_file(tensors, file, {"format": "pt"})
    model = read(tmp_path)
    assert model.get_submodule(path.format(0)).bias is None
    assert model.get_submodule(path.format(1)).bias.tolist() == [1.0] * 48


REFUSED = {
    "bits": (gptq(5), "gptq with bits=5, which is not read here; 2 or 3 or 4 or 8 is"),
    "layout": (gptq(layout="marlin"), "gptq with checkpoint_format=marlin"),
    "format": ({**gptq(layout=""), "format": "bitblas"}, "gptq with format=bitblas"),
    "words": ({**gptq(), "pack_dtype": "int16"}, "pack_dtype=int16"),
    "dynamic": ({**gptq(), "dynamic": {"-:a": {}, "b": {}}}, "dynamic=b"),
    "size": (gptq(size=0), "gptq with group_size=0"),
    "awq": ({**AWQ, "version": "gemv"}, "awq with version=gemv, which is not read here; gemm is"),
    "llm-awq": ({**AWQ, "backend": "llm-awq"}, "awq with backend=llm-awq"),
    "awq8": ({**AWQ, "bits": 8}, "awq with bits=8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_layouts_are_refused_by_name(case: str) -> None:
    told, message = REFUSED[case]
    config = tiny.llama().config
    config.quantization_config = told
    with pytest.raises(UserError) as refused:
        refuse_stored("m", config, "none")
    assert message in str(refused.value)
    assert refused.value.exit_code == 2


def test_what_does_not_fit_the_model_is_refused_with_its_name(tmp_path: Path) -> None:
    packer.checkpoint(tmp_path, "llama", "gptq")
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, told = load_file(file), json.loads(config.read_text())
    path = "model.layers.1.self_attn.k_proj"

    def refusal(changed: dict[str, Tensor | None], **values: Any) -> str:
        kept = {k: v for k, v in (tensors | changed).items() if v is not None}
        save_file(kept, file, {"format": "pt"})
        quantised = {**told["quantization_config"], **values}
        config.write_text(json.dumps(told | {"quantization_config": quantised}))
        with pytest.raises(DataError) as refused:
            read(tmp_path)
        return str(refused.value)

    assert f"{path}.scales is (2, 8)" in refusal({f"{path}.scales": torch.ones(2, 8).half()})
    assert f"{path}.qzeros is missing" in refusal({f"{path}.qzeros": None})
    assert "qweight is (4, 32); a linear of 32 inputs and 32 outputs in 8 bits" in refusal(
        {}, bits=8
    )
    assert "groups of 32 has (1, 4)" in refusal({}, group_size=32)
    stray = refusal({f"{path}.g_idx": torch.full((32,), 2, dtype=torch.int32)})
    assert f"{path}.g_idx names group 2 of 2" in stray
    act = {"model.layers.0.mlp.act.scales": torch.ones(48)}
    assert "weights that config.json knows nothing of: model.layers.0.mlp.act.scales" in refusal(
        act
    )
    plain = {k: None for k in tensors if ".qweight" in k}
    assert "no linear of LlamaForCausalLM is packed (.qweight)" in refusal(plain)
    with pytest.raises(DataError, match=r"m: 12 outputs of 4 bits fill no whole words"):
        packed._refuse_misfits("m", Packing(4, 16), nn.Linear(32, 12), {})
