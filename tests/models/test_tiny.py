"""The tiny models that the whole suite stands on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests import tiny


@pytest.mark.parametrize("name", tiny.models())
def test_a_tiny_model_learns_from_its_batch(name: str) -> None:
    model, batch = tiny.models()[name](), tiny.batch(name)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", tiny.models())
def test_a_tiny_model_is_the_same_at_every_call_and_leaves_the_random_stream(name: str) -> None:
    torch.manual_seed(3)
    first = tiny.models()[name]().state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)
    second = tiny.models()[name]().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", tiny.FOLDERS)
def test_a_tiny_folder_is_the_same_at_every_call(name: str, tmp_path: Path) -> None:
    first, second = (tiny.FOLDERS[name](tmp_path / part) for part in "ab")
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_a_tiny_tokenizer_gives_back_its_text(name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.FOLDERS[name](tmp_path))
    text = "Is it 5 or true? The dog: yes!"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(ids) < len(text)


def test_the_tiny_chat_marks_its_turns(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.tiny_llama(tmp_path))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yes"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert tokenizer(text).input_ids.count(tokenizer.eos_token_id) == 2
