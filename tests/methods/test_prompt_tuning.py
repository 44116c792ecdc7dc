"""What prompt tuning promises: counts, starts, where the prompt stands, and peft's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
)

from peftcli.core.graft import is_own
from peftcli.core.host import Host
from peftcli.data.collate import causal_collator
from peftcli.errors import ConfigError, NotApplicable
from peftcli.export import adapter
from peftcli.methods.prompt import LaidTokens, prompt_of
from peftcli.methods.prompt_tuning import PromptTuning
from peftcli.models.load import empty_model
from peftcli.train import objective
from tests import tiny
from tests.train.conftest import chats

P = 5


class Words:
    """A calibration that only reads words, with two classes."""

    labels = ("7 8", "9")

    @staticmethod
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def adapted(model: str | torch.nn.Module, data: Any = None, **fields: Any) -> Host:
    torch.manual_seed(3)
    host = Host(tiny.models()[model]() if isinstance(model, str) else model)
    host.add(PromptTuning(**{"num_virtual_tokens": P, "init": "random", **fields}), data=data)
    return host


def table(model: str) -> torch.Tensor:
    return tiny.models()[model]().get_parameter("model.embed_tokens.weight")


def test_a_codellama_of_7b_trains_81920_numbers() -> None:
    config = LlamaConfig(vocab_size=32016, hidden_size=4096, num_hidden_layers=1)
    host = Host(empty_model(config, "causal_lm"))
    host.add(PromptTuning(num_virtual_tokens=20))
    assert host.num_parameters()[0] == 81_920


@pytest.mark.parametrize(
    ("d", "length", "count"), [(4096, 5, 20_480), (4096, 100, 409_600), (512, 100, 51_200)]
)
def test_t5_trains_one_tensor_of_length_times_width(d: int, length: int, count: int) -> None:
    config = T5Config(d_model=d, num_layers=1, d_ff=8, num_heads=8, vocab_size=32128)
    host = Host(empty_model(config, "seq2seq"))
    host.add(PromptTuning(num_virtual_tokens=length))
    assert [p.numel() for p in host.trained().values()] == [count]


# -- starts ----------------------------------------------------------------------------------------
def test_a_text_is_repeated_to_the_length() -> None:
    host = adapted("llama", Words(), num_virtual_tokens=8, init="text", init_text="7 8 9")
    wanted = table("llama")[[7, 8, 9, 7, 8, 9, 7, 8]]
    assert torch.equal(prompt_of(host, "default").E, wanted)
    host = adapted("llama", Words(), num_virtual_tokens=2, init="text", init_text="7 8 9")
    assert torch.equal(prompt_of(host, "default").E, table("llama")[[7, 8]])


def test_a_text_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="has no tokens"):
        adapted("llama", Words(), init="text")


def test_labels_start_as_the_mean_of_their_tokens_and_the_rest_as_frequent_words() -> None:
    host = adapted("llama", Words(), init="class_label", vocab_top_k=4)
    E, W = prompt_of(host, "default").E, table("llama")
    torch.testing.assert_close(E[0], (W[7] + W[8]) / 2)
    assert torch.equal(E[1], W[9])
    assert all(any(torch.equal(row, W[i]) for i in range(4)) for row in E[2:])


def test_random_is_uniform_within_its_range() -> None:
    host = adapted("llama", num_virtual_tokens=200, random_range=0.2)
    E = prompt_of(host, "default").E.detach()
    assert E.abs().max() <= 0.2
    assert E.std() == pytest.approx(0.2 / 3**0.5, rel=0.05)


# -- where it stands -------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["llama", "gpt2", "t5", "bert"])
def test_the_embeddings_of_a_text_are_the_text(model: str) -> None:
    host = adapted(model, Words(), init="text", init_text="7 8 9 10 11")
    batch = tiny.batch(model)
    batch["attention_mask"][0, -3:] = 0
    text = torch.tensor([[7, 8, 9, 10, 11]] * 2)
    inside = model == "bert"  # behind [CLS]
    longer = {
        name: torch.cat([x[:, :inside], laid, x[:, inside:]], 1)
        for name, x, laid in (
            ("input_ids", batch["input_ids"], text),
            ("attention_mask", batch["attention_mask"], torch.ones_like(text)),
        )
    }
    if model == "t5":
        longer["labels"] = batch["labels"]
    base = tiny.models()[model]()(**longer).logits
    ours = host.model(**batch).logits
    torch.testing.assert_close(ours, base if ours.ndim == 2 else base[:, -9:], atol=1e-5, rtol=1e-4)


def test_a_scaled_embedding_is_left_behind() -> None:
    """Gemma multiplies what it looks up; the prompt stands where the product does."""
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["full_attention"] * 2,
    )
    torch.manual_seed(0)
    base = Gemma3ForCausalLM(config).eval()
    ids = tiny.batch("llama")["input_ids"]
    text = torch.tensor([[7, 8, 9, 10, 11]] * 2)
    wanted = base(input_ids=torch.cat([text, ids], 1)).logits[:, P:]
    host = adapted(base, Words(), init="text", init_text="7 8 9 10 11")
    torch.testing.assert_close(host.model(input_ids=ids).logits, wanted, atol=1e-5, rtol=1e-4)


def test_a_classifying_decoder_reads_the_last_token_that_is_no_padding() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=64, num_attention_heads=4, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    host = adapted(LlamaForSequenceClassification(config).eval())
    ids, mask = torch.tensor([[9, 8, 7, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0]])
    padded = host.model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(padded, host.model(input_ids=ids[:, :3]).logits)


def test_a_roberta_counts_the_prompt_in_its_positions() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = RobertaConfig(vocab_size=70, num_attention_heads=4, pad_token_id=1, **sizes)
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(config).eval()
    ids = tiny.batch("bert")["input_ids"]
    text = torch.tensor([[7, 8, 9, 10, 11]] * 2)
    wanted = base(input_ids=torch.cat([ids[:, :1], text, ids[:, 1:]], 1)).logits
    host = adapted(base, Words(), init="text", init_text="7 8 9 10 11")
    torch.testing.assert_close(host.model(input_ids=ids).logits, wanted, atol=1e-6, rtol=1e-5)


def test_token_types_of_the_prompt_are_zero() -> None:
    host, ids = adapted("bert"), tiny.batch("bert")["input_ids"]
    plain = host.model(input_ids=ids).logits
    zero = host.model(input_ids=ids, token_type_ids=torch.zeros_like(ids)).logits
    torch.testing.assert_close(plain, zero)
    assert not torch.equal(host.model(input_ids=ids, token_type_ids=ids % 2).logits, plain)


# -- loss, selection of logits, generation ---------------------------------------------------------
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_the_loss_is_the_mean_over_the_targets_alone(model: str) -> None:
    host, batch = adapted(model), tiny.batch(model)
    batch["labels"][:, 0] = batch["labels"][0, :4] = -100  # the prompt's last token predicts none
    out = host.model(**batch)
    logits, targets = out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    torch.testing.assert_close(out.loss, F.cross_entropy(logits, targets))


def test_labels_of_the_prompt_are_no_targets() -> None:
    tokens, labels = LaidTokens(tiny.VOCAB, P), tiny.batch("llama")["labels"]
    seen: list[dict[str, Any]] = []
    tokens({"input_ids": labels, "labels": labels}, seen.append)
    assert (seen[0]["labels"][:, :P] == -100).all()
    assert torch.equal(seen[0]["labels"][:, P:], labels)


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 4, 8])], ids=str)
def test_the_callers_choice_of_logits_is_kept(keep: int | torch.Tensor) -> None:
    host, ids = adapted("llama"), tiny.batch("llama")["input_ids"]
    every = host.model(input_ids=ids).logits
    some = host.model(input_ids=ids, logits_to_keep=keep).logits
    wanted = every[:, -keep:] if isinstance(keep, int) else every[:, keep]
    torch.testing.assert_close(some, wanted)


def test_the_runs_own_loss_does_not_depend_on_the_rows_beside() -> None:
    host, examples = adapted("gpt2"), chats(4)
    collate = causal_collator(0, packing=False)
    together = objective.loss_sum("causal_lm", host.model, collate(examples))
    apart = sum(objective.loss_sum("causal_lm", host.model, collate([e])) for e in examples)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_left_padded_row_generates_what_it_does_alone(model: str) -> None:
    host, ids = adapted(model), tiny.batch(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    options = {"max_new_tokens": 5, "do_sample": False}
    padded = host.model.generate(input_ids=ids, attention_mask=mask, **options)
    alone = ids[:1, 3:]
    alone = host.model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **options)
    assert torch.equal(padded[0, -5:], alone[0, -5:])


def test_two_prompts_stand_one_behind_the_other() -> None:
    host, ids = adapted("llama"), tiny.batch("llama")["input_ids"]
    host.add(PromptTuning(num_virtual_tokens=3, init="random"), "second")
    both = host.model(input_ids=ids).logits
    rows = torch.cat([prompt_of(host, n).rows() for n in ("default", "second")])
    fresh = adapted("llama", num_virtual_tokens=P + 3)
    prompt_of(fresh, "default").E.data = rows
    torch.testing.assert_close(fresh.model(input_ids=ids).logits, both, atol=1e-6, rtol=1e-5)


def test_ten_steps_leave_the_base_bit_for_bit() -> None:
    host, batch = adapted("llama"), tiny.batch("llama")
    base = {n: t.clone() for n, t in host.model.state_dict().items() if not is_own(n)}
    optimizer = torch.optim.AdamW(host.trained().values(), 0.1)
    first = host.model(**batch).loss.item()
    for _ in range(10):
        optimizer.zero_grad()
        host.model(**batch).loss.backward()
        optimizer.step()
    assert host.model(**batch).loss.item() < first
    assert all(torch.equal(t, base[n]) for n, t in host.model.state_dict().items() if n in base)


def test_models_without_tokens_are_refused() -> None:
    with pytest.raises(NotApplicable, match="ViTForImageClassification looks up no tokens"):
        adapted("vit")
    with pytest.raises(ValueError, match="with embeddings"):
        adapted("llama").model(inputs_embeds=torch.zeros(1, 2, 32))


# -- Hugging Face peft -----------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", ["llama", "gpt2", "t5"])
def test_a_prompt_of_peft_is_read_as_peft_computes_it(model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = "SEQ_2_SEQ_LM" if model == "t5" else "CAUSAL_LM"
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=P)
    theirs = peft.get_peft_model(tiny.models()[model](), config).eval()
    theirs.save_pretrained(tmp_path)
    host = Host(tiny.models()[model]())
    adapter.load(host, tmp_path)
    batch = tiny.batch(model)
    batch["attention_mask"][0, -2:] = 0
    ours, stock = host.model(**batch).logits, theirs(**batch).logits[:, -9:]
    rows = batch["attention_mask"] > 0 if model != "t5" else ...
    torch.testing.assert_close(ours[rows], stock[rows], atol=1e-5, rtol=1e-4)


def test_prompts_of_peft_under_a_head_are_refused() -> None:
    with pytest.raises(ValueError, match="SEQ_CLS"):
        PromptTuning.from_hf({"task_type": "SEQ_CLS", "num_virtual_tokens": 3})
    host = adapted("bert")
    assert "head" in (host.adapters["default"].hf_refuses(host, "default") or "")
