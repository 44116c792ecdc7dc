"""Roles of every family that we name, read off real models on the meta device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peftcli.models.roles import layout
from tests import tiny

D, F, H, V = 32, 48, 4, 64  # width, MLP width, heads, vocabulary
COMMON = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
STACKS = {
    "vocab_size": V,
    "d_model": D,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": H,
    "decoder_attention_heads": H,
    "encoder_ffn_dim": F,
    "decoder_ffn_dim": F,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
T5 = {"vocab_size": V, "d_model": D, "d_ff": F, "d_kv": 8, "num_layers": 2, "num_heads": H}
TOWER = {k: v for k, v in COMMON.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 4}
GPT: dict[str, Any] = {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": H}
BLOOM = {"vocab_size": V, "hidden_size": D, "n_layer": 2, "n_head": H}
LLAMA_ROLES = "q k v o gate up down"
BERT_ROLES = "q k v o up down"

FAMILIES: dict[
    str, tuple[str, str, dict[str, Any], str]
] = {  # class, config, its values, roles of a block
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, LLAMA_ROLES),
    "llama_classifier": ("LlamaForSequenceClassification", "LlamaConfig", GROUPED, LLAMA_ROLES),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, LLAMA_ROLES),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, LLAMA_ROLES),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED, LLAMA_ROLES),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED, LLAMA_ROLES),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED, LLAMA_ROLES),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", GROUPED, LLAMA_ROLES),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", GROUPED, LLAMA_ROLES),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED, LLAMA_ROLES),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", GROUPED, LLAMA_ROLES),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", GROUPED, "q k v o"),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", GROUPED, BERT_ROLES),
    "phi": ("PhiForCausalLM", "PhiConfig", GROUPED, BERT_ROLES),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, BERT_ROLES),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", COMMON, BERT_ROLES),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT, BERT_ROLES),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM, BERT_ROLES),
    "falcon_7b": ("FalconForCausalLM", "FalconConfig", COMMON, BERT_ROLES),
    "falcon_40b": (
        "FalconForCausalLM",
        "FalconConfig",
        {**COMMON, "num_kv_heads": 2, "new_decoder_architecture": True},
        BERT_ROLES,
    ),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {"vocab_size": V, "d_model": D, "n_layers": 2, "n_heads": H},
        BERT_ROLES,
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**COMMON, "ffn_dim": F, "word_embed_proj_dim": 16},
        BERT_ROLES,
    ),
    "bert": ("BertForSequenceClassification", "BertConfig", COMMON, BERT_ROLES),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", COMMON, BERT_ROLES),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", COMMON, BERT_ROLES),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": V, "dim": D, "hidden_dim": F, "n_layers": 2, "n_heads": H},
        BERT_ROLES,
    ),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**COMMON, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        BERT_ROLES + " pos_q pos_k",
    ),
    "modernbert": ("ModernBertForSequenceClassification", "ModernBertConfig", COMMON, LLAMA_ROLES),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, BERT_ROLES),
    "t5_gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
        LLAMA_ROLES,
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", STACKS, BERT_ROLES),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", STACKS, BERT_ROLES),
    "vit": ("ViTForImageClassification", "ViTConfig", TOWER, BERT_ROLES),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {"text_config": COMMON, "vision_config": TOWER},
        BERT_ROLES,
    ),
}
TWO_STACKS = {"t5", "t5_gated", "bart", "whisper", "clip"}
FUSED = [
    "gpt2",
    "gpt_neox",
    "gpt_bigcode",
    "bloom",
    "falcon_7b",
    "falcon_40b",
    "mpt",
    "phi3",
    "modernbert",
]


@cache
def build(family: str, device: str = "meta") -> PreTrainedModel:
    """A model of the family, made once; on the meta device it takes no time."""
    cls, config, values, _ = FAMILIES[family]
    made: PreTrainedConfig = getattr(transformers, config)(**values)
    torch.manual_seed(0)
    with torch.device(device):
        return getattr(transformers, cls)(made).eval()


def linears(model: nn.Module, inside: str = "") -> dict[str, nn.Module]:
    """Linears (Conv1D too) under a path."""
    found = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    return {path: m for path, m in found.items() if path.startswith(inside)}


def num_rows(module: Any) -> int:
    """Outputs of a linear or a Conv1D."""
    return module.nf if isinstance(module, Conv1D) else module.out_features


@pytest.mark.parametrize("family", FAMILIES)
def test_each_linear_of_a_block_has_its_roles_and_no_other(family: str) -> None:
    model = build(family)
    where = layout(model)
    expected = Counter(FAMILIES[family][3].split())
    assert len(where.blocks) == (4 if family in TWO_STACKS else 2)
    for block in where.blocks:
        paths = linears(model, block + ".")
        assert all(where.roles_of(path) for path in paths)
        found = Counter(role for path in paths for role in where.roles_of(path))
        crossed = Counter("qkvo") if len(where.attention_cores) > len(where.blocks) else Counter()
        has_cross = crossed and where.tower_of(block) == "decoder"
        assert found == (expected + crossed if has_cross else expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_fused_roles_cover_every_output_once(family: str) -> None:
    model = build(family)
    where = layout(model)
    for path, module in linears(model).items():
        ranges = [rows for rows in where.roles_of(path).values() if rows is not None]
        if not ranges:
            continue
        rows = sorted(row for some in ranges for a, b in some for row in range(a, b))
        assert rows == list(range(num_rows(module)))


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_and_heads_are_found_outside_of_blocks(family: str) -> None:
    model = build(family)
    where = layout(model)
    paths = {m: p for p, m in model.named_modules()}
    if family not in ("clip", "whisper"):  # two tables; sound comes through a convolution
        assert where.role_of(paths[model.get_input_embeddings()]) == "embed"
    if head := model.get_output_embeddings():
        assert where.role_of(paths[head]) in ("head", "classifier")
    outside = [p for p in linears(model) if where.block_of(p) is None]
    assert not {where.role_of(p) for p in outside} & set("qkvo")


def effects(family: str, fused: str, watched: str) -> Callable[[float], Tensor]:
    """What `watched` takes in (R, T, D) when some size is added to `fused`.

    In example r it is added to output row r, at token 0.
    """
    model = build(family, "cpu")
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    modules = dict(model.named_modules())
    R = num_rows(modules[fused])
    ids = torch.arange(3, 8).repeat(R, 1)  # (R, T)

    def run(size: float) -> Tensor:
        seen: list[Tensor] = []

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            return output.view(R, ids.shape[1], R).index_put(
                (torch.arange(R), torch.zeros(R, dtype=torch.long), torch.arange(R)),
                torch.tensor(size),
                accumulate=True,
            )

        def see(module: nn.Module, args: Any) -> None:
            seen.append(args[0].view(R, ids.shape[1], -1))

        hooks = [
            modules[fused].register_forward_hook(add),
            modules[watched].register_forward_pre_hook(see),
        ]
        with torch.no_grad():
            model(input_ids=ids)
        for hook in hooks:
            hook.remove()
        return seen[0]

    return run


def by_role(model: nn.Module, role: str) -> str:
    """The first module with that one role."""
    where = layout(model)
    return next(path for path in where.names if where.role_of(path) == role)


def declared(model: nn.Module, path: str) -> list[str]:
    """The role of each output row."""
    roles = layout(model).roles_of(path)
    rows = {r: role for role, ranges in roles.items() for a, b in ranges or () for r in range(a, b)}
    return [rows[r] for r in sorted(rows)]


@pytest.mark.parametrize("family", FUSED)
def test_fused_rows_act_as_the_q_k_and_v_that_they_are_called(family: str) -> None:
    """A query of token 0 changes no other token; a value acts linearly; a key does neither."""
    model = build(family)
    fused, o = by_role(model, "qkv"), by_role(model, "o")
    run = effects(family, fused, o)
    once, twice = run(0.5) - run(0.0), run(1.0) - run(0.0)  # (R, T, D)
    elsewhere = once[:, 1:].abs().amax((1, 2))
    bent = (twice - 2 * once).abs().amax((1, 2)) / once.abs().amax((1, 2)).clamp(min=1e-9)
    acts = [
        "q" if e < 1e-6 else "v" if b < 1e-3 else "k" for e, b in zip(elsewhere, bent, strict=True)
    ]
    assert acts == declared(model, fused)


@pytest.mark.parametrize("family", ["phi3", "glm4", "modernbert"])
def test_fused_rows_act_as_the_gate_and_up_that_they_are_called(family: str) -> None:
    """What the activation sees acts with a bend, what it multiplies acts linearly."""
    model = build(family)
    fused, down = by_role(model, "gate_up"), by_role(model, "down")
    run = effects(family, fused, down)
    once, twice = run(0.5) - run(0.0), run(1.0) - run(0.0)
    bent = (twice - 2 * once).abs().amax((1, 2)) / once.abs().amax((1, 2)).clamp(min=1e-9)
    assert ["up" if b < 1e-3 else "gate" for b in bent] == declared(model, fused)


def test_cross_attention_of_gpt2_has_fused_keys_and_values() -> None:
    config = transformers.GPT2Config(**GPT, add_cross_attention=True)
    with torch.device("meta"):
        where = layout(transformers.GPT2LMHeadModel(config))
    path = "transformer.h.1.crossattention"
    assert where.roles_of(f"{path}.c_attn") == {"k": ((0, D),), "v": ((D, 2 * D),)}
    assert where.roles_of(f"{path}.q_attn") == {"q": None}


def test_layers_count_within_their_stack() -> None:
    where = layout(tiny.t5())
    path = "decoder.block.1.layer.1.EncDecAttention.q"
    assert (where.block_of(path), where.tower_of(path)) == (1, "decoder")
    assert where.block_path_of(path) == "decoder.block.1"
    assert where.block_of("lm_head") is None


def test_towers_are_told_apart() -> None:
    where = layout(build("clip"))
    assert set(where.towers) == {"text", "vision"}
    assert set(layout(build("vit")).towers) == {"vision"}
    assert set(layout(build("bert")).towers) == {"text"}


def test_cores_are_the_modules_that_attend() -> None:
    assert layout(build("bert")).attention_cores[0] == "bert.encoder.layer.0.attention.self"
    assert layout(build("llama")).attention_cores[0] == "model.layers.0.self_attn"


def test_modules_that_are_no_linears_have_roles_too() -> None:
    where = layout(tiny.llama())
    roles = {path: where.role_of(path) for path in where.names}
    assert roles[""] == "model"
    assert roles["model.layers.2"] == "block"
    assert roles["model.layers.2.self_attn"] == "attention"
    assert roles["model.layers.2.mlp"] == "mlp"
    assert roles["model.layers.2.input_layernorm"] == roles["model.norm"] == "norm"


class Strange(nn.Module):
    """A model that nobody has seen: blocks under another name, one fused linear."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(self.piece() for _ in range(3))
        self.lm_head = nn.Linear(4, 9)

    def piece(self) -> nn.ModuleDict:
        """A block."""
        attn = nn.ModuleDict({"Wqkv": nn.Linear(4, 12), "out_proj": nn.Linear(4, 4)})
        mlp = nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)})
        return nn.ModuleDict({"attn": attn, "ffn": mlp, "other": nn.Linear(4, 4)})


def test_an_unknown_architecture_is_read_by_its_names_and_never_guessed() -> None:
    where = layout(Strange())
    assert where.blocks == ("pieces.0", "pieces.1", "pieces.2")
    assert where.roles_of("pieces.1.attn.Wqkv") == {"qkv": None}  # rows unknown: one role
    assert where.roles_of("pieces.1.ffn.fc2") == {"down": None}
    assert where.roles_of("pieces.1.other") == {}
    assert where.role_of("lm_head") == "head"


def test_a_list_without_attention_still_counts_as_blocks() -> None:
    model = nn.Sequential(nn.ModuleList(nn.Linear(2, 2) for _ in range(4)))
    assert layout(model).blocks == ("0.0", "0.1", "0.2", "0.3")
