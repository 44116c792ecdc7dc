"""Rows of every layout say the same, and rows that do not fit say what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peftcli.data.files import Row
from peftcli.data.formats import Reader, detect
from peftcli.data.records import Chat, Completion, Instruct, Labelled, Record, Text, class_names
from peftcli.errors import ConfigError, DataError
from peftcli.settings import Task

ASKED = {"role": "user", "content": "Good?"}
ANSWERED = {"role": "assistant", "content": "yes"}


def read(format_: Any, row: dict[str, Any], **options: Any) -> Record:
    """The record of one row, which stands in line 3."""
    given = {"columns": {}, "system": None, "prompt": None, "choices": (), **options}
    return Reader(format_, folder=Path(), **given).record(Row(row, "a.jsonl", 3))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED]},
        {"messages": [{**ASKED, "name": None}, {**ANSWERED, "tool_calls": None}]},
        {"conversations": [ASKED, ANSWERED]},
        {
            "conversations": [
                {"from": "human", "value": "Good?"},
                {"from": "gpt", "value": "yes"},
            ]
        },
    ],
)
def test_layouts_of_chats_are_one(row: dict[str, Any]) -> None:
    assert read("chat", row).content == Chat((ASKED, ANSWERED))


def test_a_prompt_makes_a_chat_of_columns() -> None:
    row = {"q": "{braces} stay", "a": "yes"}
    content = read("chat", row, prompt="Q: {q}", columns={"completion": "a"}).content
    asked = {"role": "user", "content": "Q: {braces} stay"}
    assert content == Chat((asked, ANSWERED))


def test_the_system_message_is_put_before_chats_that_have_none() -> None:
    system = {"role": "system", "content": "S"}
    own = {"role": "system", "content": "own"}
    assert read("chat", {"messages": [ASKED]}, system="S").content == Chat((system, ASKED))
    assert read("chat", {"messages": [own, ASKED]}, system="S").content == Chat((own, ASKED))


def test_other_formats_read_their_columns() -> None:
    row = {"instruction": "i", "input": "", "output": "o"}
    assert read("instruct", row).content == Instruct("i", "", "o", None)
    assert read("prompt_completion", {"prompt": "p", "completion": "c"}).content == Completion(
        "p", "c"
    )
    assert read("text", {"body": "t"}, columns={"text": "body"}).content == Text("t")
    row = {"a": "t", "text_pair": "u", "label": "7"}
    columns = {"text": "a"}
    assert read("classification", row, columns=columns).content == Labelled("t", "u", "7")
    assert read("regression", row, columns=columns).content == Labelled("t", "u", 7.0)


@pytest.mark.parametrize(
    ("row", "task", "expected"),
    [
        ({"messages": []}, "causal_lm", "chat"),
        ({"conversations": []}, "causal_lm", "chat"),
        ({"instruction": "", "output": "", "text": ""}, "causal_lm", "instruct"),
        ({"prompt": "", "completion": ""}, "seq2seq", "prompt_completion"),
        ({"text": "", "label": 1}, "causal_lm", "text"),
        ({"text": "", "label": 1}, "classification", "classification"),
        ({"text": "", "label": 1}, "regression", "regression"),
    ],
)
def test_auto_finds_the_format_by_task_and_columns(
    row: dict[str, Any], task: Task, expected: str
) -> None:
    assert detect(Row(row, "a", 1), task, {}, None) == expected


def test_auto_follows_renamed_columns_and_prompts() -> None:
    row = Row({"body": "", "answer": ""}, "a", 1)
    assert detect(row, "causal_lm", {"text": "body"}, None) == "text"
    assert detect(row, "causal_lm", {"completion": "answer"}, "{body}") == "prompt_completion"


def test_auto_says_what_each_format_needs() -> None:
    with pytest.raises(DataError, match=r"the columns q, a fit no format of causal_lm \(chat: mes"):
        detect(Row({"q": "", "a": ""}, "a.csv", 1), "causal_lm", {}, None)


@pytest.mark.parametrize(
    ("format_", "row", "options", "message"),
    [
        ("text", {"txt": "a"}, {}, r"line 3: no column 'text'; it has txt.*columns.text=txt"),
        ("text", {"text": 5}, {}, r"line 3: column 'text' is the int '5', expected text"),
        ("text", {"text": None}, {}, r"column 'text' is empty, expected text"),
        ("text", {"text": "a"}, {"prompt": "{txt}"}, r"no column 'txt', which dataset.prompt"),
        ("chat", {"messages": "hi"}, {}, r"messages is the str 'hi', expected a list of turns"),
        ("chat", {"messages": []}, {}, r"messages is the list '\[\]', expected"),
        ("chat", {"messages": ["hi"]}, {}, r"turn 1: the str 'hi', expected an object"),
        ("chat", {"messages": [{"role": "me"}]}, {}, r"turn 1: the role is the str 'me'.*user"),
        ("chat", {"messages": [{"role": "user"}]}, {}, r"turn 1: the content is empty"),
        ("chat", {"messages": [ANSWERED]}, {}, r"begins with an assistant's turn"),
        ("classification", {"text": "a", "label": None}, {}, r"line 3: the label is empty"),
        ("classification", {"text": "a", "label": 1.5}, {}, r"the label is the float '1.5'"),
        ("regression", {"text": "a", "label": "x"}, {}, r"the str 'x', expected a finite number"),
        ("regression", {"text": "a", "label": float("nan")}, {}, r"expected a finite number"),
        (
            "prompt_completion",
            {"prompt": "a", "completion": "maybe"},
            {"choices": ("yes", "no")},
            r"line 3: the answer 'maybe' is none of dataset.choices=\['yes', 'no'\]",
        ),
    ],
)
def test_rows_that_do_not_fit_say_where_and_what_to_change(
    format_: str, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(format_, row, **options)


@pytest.mark.parametrize(
    ("format_", "options", "message"),
    [
        ("text", {"columns": {"txt": "a"}}, r"columns.txt: format=text knows .*mean text"),
        ("text", {"system": "S"}, r"dataset.system='S' belongs to chats"),
        ("text", {"choices": ("a", "b")}, r"dataset.choices says nothing about format=text"),
        ("chat", {"choices": ("a", "a")}, r"give two or more different answers"),
        ("text", {"prompt": "{text"}, r"dataset.prompt='{text': "),
        ("text", {"prompt": "{}"}, r"{} names no column"),
        ("text", {"prompt": "{text.__class__}"}, r"{text.__class__} names no column"),
        ("text", {"prompt": "words"}, r"dataset.prompt='words' uses no column"),
        ("image_classification", {"prompt": "{a}"}, r"says nothing about image_classification"),
    ],
)
def test_settings_that_do_not_go_with_the_format_are_refused(
    format_: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(format_, {"text": "a"}, **options)


def test_the_split_goes_by_the_question_and_not_by_the_words_around_it() -> None:
    row = {"text": "t", "label": "yes"}
    columns = {"completion": "label"}
    keys = {read("chat", row, prompt=p, columns=columns).key for p in ("{text}", "Q: {text} A:")}
    assert keys == {read("classification", row).key} == {"t"}


def test_a_group_column_is_the_key_of_the_split() -> None:
    options = {"columns": {"group": "passage"}}
    keys = [read("text", {"text": t, "passage": 4}, **options).key for t in ("a", "b")]
    assert keys == ["4", "4"]


def test_classes_are_sorted_by_number_or_name() -> None:
    assert class_names([10, 9, 2], ["", "", ""], ()) == ("2", "9", "10")
    assert class_names(["10", "9"], ["", ""], ()) == ("9", "10")
    assert class_names(["b", "a", "b"], ["", "", ""], ()) == ("a", "b")
    assert class_names(["b", "a"], ["", ""], ("b", "a")) == ("b", "a")
    with pytest.raises(DataError, match="text at line 2 but numbers at line 1"):
        class_names([1, "a"], ["line 1", "line 2"], ())
