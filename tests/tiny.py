"""Tiny real models of five architectures: in memory (`models`, `batch`), or as whole folders with
their tokenizer or image processor (`tiny_llama` ...), as the hub has them. The same weights and
tokens at every call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE, Unigram, WordPiece
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

VOCAB = 64  # of the models in memory; those in folders have their tokenizer's
TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "A film like this is good, bad, or neither; the review of the film is short.",
    "What is two plus three? Two plus three is five. What is one plus one? It is two.",
    "Translate the sentence to German. Answer the question: yes or no, true or false.",
)
WORDS = sorted(set(re.findall(r"[a-z]+", " ".join(TEXT).lower())))
CHARACTERS = [chr(code) for code in range(33, 127)]  # printable ASCII
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def llama(vocab: int = VOCAB, **special: int | None) -> PreTrainedModel:
    """Decoder with grouped queries and a head tied to the embeddings."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **special},
    )
    return _seeded(LlamaForCausalLM, config)


def gpt2(vocab: int = VOCAB, **special: int | None) -> PreTrainedModel:
    """Decoder with learned positions, fused q, k, v, and weights (I, O)."""
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **special},
    )
    return _seeded(GPT2LMHeadModel, config)


def bert(vocab: int = VOCAB, **special: int | None) -> PreTrainedModel:
    """Encoder with three classes."""
    config = BertConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **{"num_labels": 3, **special},
    )
    return _seeded(BertForSequenceClassification, config)


def t5(vocab: int = VOCAB, **special: int | None) -> PreTrainedModel:
    """Encoder and decoder with relative positions and a tied head."""
    config = T5Config(
        vocab_size=vocab,
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None, **special},
    )
    return _seeded(T5ForConditionalGeneration, config)


def vit() -> PreTrainedModel:
    """Images of 16 x 16 in patches of 4 x 4, three classes."""
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={label: f"LABEL_{label}" for label in range(3)},
    )
    return _seeded(ViTForImageClassification, config)


def models() -> dict[str, Callable[[], PreTrainedModel]]:
    """Builders by name; each call gives a new model with the same weights, in evaluation mode."""
    return {"llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "vit": vit}


def quantised(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The model with its blocks' linears in bitsandbytes' 4 bits (`nf4`) or 8 bits (`int8`), or in
    4 packed bits drawn anew (`gptq`).
    """
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    from peftcli.models.quantise import keep_stored

    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or path == "lm_head":
            continue
        sizes, bias = (module.in_features, module.out_features), module.bias is not None
        if kind == "gptq":
            setattr(*_place(model, path), _packed(module))
            continue
        if kind == "nf4":
            new: nn.Module = Linear4bit(*sizes, bias, compute_dtype=torch.float32, quant_type="nf4")
        else:
            new = Linear8bitLt(*sizes, bias, has_fp16_weights=False)
        new.load_state_dict(module.state_dict())
        setattr(*_place(model, path), new.to("cpu"))
    keep_stored(model)
    return model.eval()


def _place(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Where a module hangs, and by which name."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def _packed(linear: nn.Linear) -> nn.Module:
    """A packed linear of the same size, with weights of about the same size, in act-order."""
    from peftcli.core.packed import PackedLinear, Packing

    packing, sizes = Packing(4, 16), (linear.in_features, linear.out_features)
    shapes = packing.shapes(linear.out_features, linear.in_features)
    stored = {
        "qweight": torch.randint(-(2**31), 2**31, shapes["qweight"], dtype=torch.int32),
        "qzeros": torch.full(shapes["qzeros"], 0x77777777, dtype=torch.int32),
        "scales": torch.full(shapes["scales"], 0.004, dtype=torch.float16),
        "g_idx": torch.randperm(linear.in_features).int() % shapes["scales"][0],
    }
    new = PackedLinear(packing, *sizes, stored, torch.float32)
    new.settle()
    return new


def batch(name: str, rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Inputs and labels for a model of `models`, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    classes = torch.arange(rows) * 2 % 3
    if name == "vit":
        return {
            "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
            "labels": classes,
        }
    ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    labels = classes if name == "bert" else ids.clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Look:
    """The batches of `batch`, of 2, 3, ... rows, as what a method may look at before it starts."""

    tokenizer = None
    labels = ()

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def batches(self, n: int) -> Iterator[dict[str, Tensor]]:
        """The first `n`."""
        for rows in range(2, 2 + n):
            yield batch(self.name, rows)

    def forward(self, batch: Any) -> None:
        """Run the model over the batch."""
        self.model(**batch)

    def loss(self, batch: Any) -> Tensor:
        """The model's own loss."""
        return self.model(**batch).loss

    def tokens(self, batch: Any, source: bool = False) -> Tensor | None:
        """All of them count."""
        return None


def tiny_llama(folder: Path) -> Path:
    """Byte-level BPE with ChatML; as in SmolLM2 the end of a turn is also the padding."""
    tokenizer = _byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    fast.chat_template = CHATML
    model = llama(len(fast), pad_token_id=2, bos_token_id=1, eos_token_id=2)
    return _save(folder, model, fast)


def tiny_gpt2(folder: Path) -> Path:
    """Byte-level BPE with one special token, no chat template and no padding token, as in GPT-2."""
    end = "<|endoftext|>"
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_byte_level(end), bos_token=end, eos_token=end, unk_token=end
    )
    model = gpt2(len(fast), pad_token_id=None, bos_token_id=0, eos_token_id=0)
    return _save(folder, model, fast)


def tiny_bert(folder: Path) -> Path:
    """Lower-case WordPiece, [CLS] before and [SEP] after a text; three classes."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    lower = [c for c in CHARACTERS if c == c.lower()]
    words = [word for word in WORDS if len(word) > 1]
    pieces = [*special, *lower, *(f"##{c}" for c in lower), *words]
    tokenizer = Tokenizer(WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, special, strict=True))
    )
    return _save(folder, bert(len(fast), pad_token_id=0), fast)


def tiny_t5(folder: Path) -> Path:
    """Unigram with metaspaces; every text ends in </s>, and <pad> starts the decoder."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [(c, -8.0) for c in CHARACTERS] + [(f"\u2581{word}", -6.0) for word in WORDS]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    return _save(folder, t5(len(fast), pad_token_id=0, eos_token_id=1), fast)


def tiny_vit(folder: Path) -> Path:
    """Images are resized to 16 x 16 and normalised to [-1, 1]."""
    return _save(folder, vit(), ViTImageProcessorPil(size={"height": 16, "width": 16}))


FOLDERS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": tiny_bert,
    "t5": tiny_t5,
    "vit": tiny_vit,
}


def _byte_level(*special: str) -> Tokenizer:
    """Byte-level BPE: the special tokens, the 256 bytes, and up to 64 merges of `TEXT`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + 256 + 64,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _seeded(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config).eval()


def _save(
    folder: Path, *parts: PreTrainedModel | PreTrainedTokenizerFast | ViTImageProcessorPil
) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return Path(folder)
