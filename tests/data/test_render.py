"""What is trained is what is generated: ids and targets for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from peftcli.data.records import Chat, Completion, Content, Instruct, Labelled, Record, Text
from peftcli.data.render import Rendered, Renderer, render_prompt
from peftcli.errors import ConfigError, DataError

Tok = PreTrainedTokenizerBase
TURNS = (
    {"role": "system", "content": "Answer."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three? Say: <|im_end|>two"},
    {"role": "assistant", "content": "four\n\nfive "},
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
FORGETFUL = (  # as Qwen3 does with thoughts: earlier answers lose what stands before '#'
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if loop.last or m['role'] == 'user' %}"
    "{{ m['content'] }}{% else %}{{ m['content'].split('#')[-1] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def record(content: Content, choices: tuple[str, ...] = ()) -> Record:
    """A record that stood in line 7."""
    return Record("a:7", "a.jsonl, line 7", "key", content, choices)


def render(
    tokenizer: Tok, content: Content, train_on: Any = "completion", **options: Any
) -> Rendered:
    """One record's ids and targets."""
    return Renderer(tokenizer, train_on).decoder([record(content, **options)])[0]


def with_template(tokenizer: Tok, template: str, **tokens: str) -> Tok:
    """The tokenizer with another chat template."""
    other = deepcopy(tokenizer)
    other.chat_template = template
    for name, token in tokens.items():
        setattr(other, name, token)
    return other


def targets(tokenizer: Tok, rendered: Rendered) -> list[str]:
    """The runs of supervised tokens, decoded."""
    runs = np.split(rendered.input_ids, np.flatnonzero(np.diff(rendered.supervised)) + 1)
    return [str(tokenizer.decode(r)) for r in runs[int(not rendered.supervised[0]) :: 2]]


def answers(choices: Sequence[np.ndarray] | None, tokenizer: Tok) -> list[str]:
    """Choices, decoded."""
    assert choices is not None
    return [str(tokenizer.decode(c)) for c in choices]


# -- chats -----------------------------------------------------------------------------------------
def test_targets_are_the_answers_with_their_end_tokens(chat: Tok) -> None:
    rendered = render(chat, Chat(TURNS))
    assert targets(chat, rendered) == ["two<|im_end|>", "four\n\nfive <|im_end|>"]


def test_last_trains_the_last_answer_alone(chat: Tok) -> None:
    assert targets(chat, render(chat, Chat(TURNS), "last")) == ["four\n\nfive <|im_end|>"]


def test_all_trains_every_token_but_the_first_which_nothing_predicts(chat: Tok) -> None:
    rendered = render(chat, Chat(TURNS), "all")
    assert rendered.supervised.tolist() == [False] + [True] * (len(rendered.input_ids) - 1)


def test_ids_are_those_of_the_whole_rendered_string(chat: Tok) -> None:
    text = str(chat.apply_chat_template(list(TURNS), tokenize=False))
    expected = chat(text, add_special_tokens=False).input_ids
    assert render(chat, Chat(TURNS)).input_ids.tolist() == expected


def test_the_prompt_to_generate_from_is_what_training_saw_before_the_answer(chat: Tok) -> None:
    rendered = render(chat, Chat(TURNS))
    assert render_prompt(TURNS[:-1], chat) == rendered.input_ids[: rendered.prompt_length].tolist()


def test_templates_with_their_own_begin_token_give_one(base: Tok) -> None:
    llama2 = with_template(base, LLAMA2)
    rendered = render(llama2, Chat(TURNS[1:3]))
    assert rendered.input_ids.tolist().count(llama2.bos_token_id) == 1
    assert targets(llama2, rendered) == [" two </s>"]
    assert (
        render_prompt(TURNS[1:2], llama2) == rendered.input_ids[: rendered.prompt_length].tolist()
    )


def test_chats_that_end_with_a_question_have_no_last_answer(chat: Tok) -> None:
    rendered = render(chat, Chat(TURNS[:4]))
    assert targets(chat, rendered) == ["two<|im_end|>"]
    assert rendered.prompt_length is None


def test_templates_that_rewrite_earlier_turns_are_refused_unless_the_last_is_trained(
    chat: Tok,
) -> None:
    forgetful = with_template(chat, FORGETFUL)
    turns = [dict(t) for t in TURNS[1:]]
    turns[1]["content"] = "think#two"
    with pytest.raises(DataError, match=r"line 7, turn 2: .*differently.*train_on=last"):
        render(forgetful, Chat(tuple(turns)))
    assert targets(forgetful, render(forgetful, Chat(tuple(turns)), "last")) == [
        "four\n\nfive <|im_end|>"
    ]


def test_templates_without_an_end_of_turn_token_are_refused(chat: Tok) -> None:
    endless = with_template(chat, "{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    with pytest.raises(ConfigError, match=r"no end-of-turn token.*eos_token"):
        render(endless, Chat(TURNS))


def test_what_a_template_raises_names_the_row(chat: Tok) -> None:
    strict = with_template(chat, "{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"a.jsonl, line 7: .*no system role"):
        render(strict, Chat(TURNS))


def test_a_base_model_cannot_chat_and_says_what_to_give(base: Tok) -> None:
    with pytest.raises(ConfigError, match=r"no chat template.*model.chat_template=FILE.jinja"):
        render(base, Chat(TURNS))


# -- plain text ------------------------------------------------------------------------------------
def test_completions_begin_as_the_tokenizer_does_and_end_with_a_supervised_end(base: Tok) -> None:
    rendered = render(base, Completion("one two", " three"))
    assert base.decode(rendered.input_ids) == "<s>one two three</s>"
    assert targets(base, rendered) == [" three</s>"]
    assert render_prompt("one two", base) == rendered.input_ids[: rendered.prompt_length].tolist()


def test_a_space_at_the_prompts_end_belongs_to_the_answer(base: Tok) -> None:
    spaced, joined = (
        render(base, Completion("one ", "two")),
        render(base, Completion("one", " two")),
    )
    assert spaced.input_ids.tolist() == joined.input_ids.tolist()
    assert spaced.supervised.tolist() == joined.supervised.tolist()
    assert render_prompt("one ", base) == render_prompt("one", base)


def test_begin_and_end_tokens_that_the_text_has_are_not_doubled(base: Tok) -> None:
    rendered = render(base, Completion("<s>one", " two</s>"))
    assert rendered.input_ids.tolist() == render(base, Completion("one", " two")).input_ids.tolist()
    assert render_prompt("<s>one", base) == render_prompt("one", base)


def test_texts_are_targets_from_the_first_token_that_is_predicted(base: Tok, chat: Tok) -> None:
    assert targets(base, render(base, Text("one two"))) == ["one two</s>"]
    assert render(chat, Text("one two")).supervised.tolist()[:2] == [False, True]
    assert render(base, Text("one two")).prompt_length is None


def test_the_end_token_is_a_target_though_it_is_the_padding_too(chat: Tok) -> None:
    assert chat.pad_token_id == chat.eos_token_id
    assert targets(chat, render(chat, Completion("one", " two"))) == [" two<|im_end|>"]


def test_characters_of_many_bytes_are_supervised_whole(base: Tok) -> None:
    assert targets(base, render(base, Completion("\u00e9", "\u732b\U0001f63a"))) == [
        "\u732b\U0001f63a</s>"
    ]


def test_instructions_use_the_chat_template_or_a_plain_layout(chat: Tok, base: Tok) -> None:
    task = Instruct("Add.", "1 2", "3", None)
    asked = chat.decode(render(chat, task).input_ids)
    assert asked == "<|im_start|>user\nAdd.\n\n1 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    plain = render(base, task)
    assert "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>" in base.decode(
        plain.input_ids
    )
    assert targets(base, plain) == ["3</s>"]


def test_a_tokenizer_without_an_end_token_is_refused(base: Tok) -> None:
    endless = deepcopy(base)
    endless.eos_token = None
    with pytest.raises(ConfigError, match=r"no end-of-text token.*model.tokenizer"):
        render(endless, Text("one"))


# -- choices ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("right", ["positive", "negative"])
def test_choices_continue_one_prompt_without_end_tokens(chat: Tok, base: Tok, right: str) -> None:
    names = ("negative", "positive", "no idea")
    asked = Chat((*TURNS[:2], {"role": "assistant", "content": right}))
    for tokenizer, content in ((chat, asked), (base, Completion("Good? ", right))):
        rendered = render(tokenizer, content, choices=names)
        P = rendered.prompt_length
        assert rendered.choices is not None
        assert rendered.answer == names.index(right)
        assert [a.strip() for a in answers(rendered.choices, tokenizer)] == list(names)
        choice = rendered.choices[names.index(right)].tolist()
        assert rendered.input_ids[P:].tolist()[: len(choice)] == choice
        assert tokenizer.eos_token_id not in np.concatenate(rendered.choices)


def test_choices_that_merge_with_the_prompt_are_refused(base: Tok) -> None:
    with pytest.raises(DataError, match=r"line 7: .*do not continue the same prompt tokens"):
        render(base, Completion("is pos", "itive"), choices=("itive", "\u00e9"))


# -- encoders --------------------------------------------------------------------------------------
def test_sources_and_targets_of_t5_end_with_its_end_token(t5: Tok) -> None:
    pair = Renderer(t5).seq2seq([record(Completion("one two", "three"), ("three", "four"))])[0]
    assert str(t5.decode(pair.input_ids)).endswith("two</s>")
    assert str(t5.decode(pair.labels)).endswith("three</s>")
    assert pair.labels.tolist().count(t5.eos_token_id) == 1
    assert answers(pair.choices, t5) == ["three", "four"]
    assert pair.answer == 0


def test_chats_are_plain_lines_for_t5(t5: Tok) -> None:
    pair = Renderer(t5).seq2seq([record(Chat(TURNS[:3]))])[0]
    assert t5.decode(pair.labels) == t5.decode(t5("two").input_ids)
    with pytest.raises(DataError, match="ends without an answer"):
        Renderer(t5).seq2seq([record(Chat(TURNS[:2]))])


def test_pairs_are_told_apart_by_token_types(encoder: Tok) -> None:
    records = [record(Labelled("one two", "three", 1)), record(Labelled("one", None, 0))]
    pair, single = Renderer(encoder).classifier(records)
    assert encoder.decode(pair.input_ids) == "[CLS] one two [SEP] three [SEP]"
    assert pair.token_type_ids is not None
    second = pair.input_ids[pair.token_type_ids == 1]
    assert encoder.decode(second) == "three [SEP]"
    assert encoder.decode(single.input_ids) == "[CLS] one [SEP]"
