"""Rows of any layout to records: what is asked, what is answered, and where it stood.

    chat                  messages (or ShareGPT's conversations); or `dataset.prompt` and completion
    instruct              instruction, output, optionally input; or `dataset.prompt` and output
    prompt_completion     prompt, completion; or `dataset.prompt` and completion
    text                  text; or `dataset.prompt`
    classification        text (or `dataset.prompt`), label, optionally text_pair
    regression            the same with a number as label
    image_classification  image (a path, or bytes), label

`dataset.columns` says what a file calls these. With any format, `dataset.columns.group` names a
column whose equal values never stand on both sides of the split; without it these are rows with the
same question, whatever the words of the prompt around it.
"""

from __future__ import annotations

import math
import os
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peftcli.data.files import Row
from peftcli.data.records import (
    Chat,
    Completion,
    Content,
    Instruct,
    Labelled,
    Message,
    Picture,
    Record,
    Text,
    answer,
    question,
)
from peftcli.errors import ConfigError, DataError, did_you_mean, nearest
from peftcli.settings import Format, Task

COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # needed, optional
    "chat": (("messages",), ("conversations", "completion")),
    "instruct": (("instruction", "output"), ("input",)),
    "prompt_completion": (("prompt", "completion"), ()),
    "text": (("text",), ()),
    "classification": (("text", "label"), ("text_pair",)),
    "regression": (("text", "label"), ("text_pair",)),
    "image_classification": (("image", "label"), ()),
}
FORMATS: dict[Task, tuple[Format, ...]] = {  # by task, in the order in which `auto` tries
    "causal_lm": ("chat", "instruct", "prompt_completion", "text"),
    "seq2seq": ("chat", "instruct", "prompt_completion"),
    "classification": ("classification",),
    "regression": ("regression",),
    "image_classification": ("image_classification",),
}
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")


def detect(row: Row, task: Task, columns: Mapping[str, str], prompt: str | None) -> Format:
    """The task's first format whose columns the row has."""
    allowed = FORMATS[task]
    if len(allowed) == 1:
        return allowed[0]
    for name in allowed:
        needed = {"messages"} if name == "chat" else set(COLUMNS[name][0]) - _replaced(name, prompt)
        if name == "chat" and columns.get("messages", "messages") not in row:
            needed = {"conversations"}
        if needed and all(columns.get(c, c) in row for c in needed):
            return name
    wanted = "; ".join(f"{name}: {', '.join(COLUMNS[name][0])}" for name in allowed)
    raise DataError(
        f"{row.where}: the columns {', '.join(row)} fit no format of {task} ({wanted}). Set "
        "dataset.format and name the columns, as in "
        f"dataset.columns.{COLUMNS[allowed[-1]][0][-1]}={next(iter(row), 'NAME')}."
    )


def _replaced(name: str, prompt: str | None) -> set[str]:
    """Columns that `dataset.prompt` stands for."""
    return (
        {"messages", "instruction", "prompt", "text"} & set(COLUMNS[name][0])
        if prompt is not None
        else set()
    )


@dataclass(frozen=True)
class Reader:
    """Reads rows of one format."""

    format: Format
    columns: Mapping[str, str]
    system: str | None
    prompt: str | None
    choices: tuple[str, ...]
    folder: Path  # what image paths are relative to

    def __post_init__(self) -> None:
        """Refuse keys that say nothing about the format."""
        needed, optional = COLUMNS[self.format]
        known = (*needed, *optional, "group")
        for column in self.columns:
            if column not in known:
                raise ConfigError(
                    f"dataset.columns.{column}: format={self.format} knows no such column, but "
                    f"{', '.join(known)}.{did_you_mean(column, known)}"
                )
        if self.system is not None and self.format not in ("chat", "instruct"):
            raise ConfigError(
                f"dataset.system={self.system!r} belongs to chats, and the format is "
                f"{self.format}. Write it into dataset.prompt instead, or set dataset.format=chat."
            )
        if self.prompt is not None and self.format == "image_classification":
            raise ConfigError("dataset.prompt says nothing about image_classification. Remove it.")
        if self.choices and self.format in ("text", "regression"):
            raise ConfigError(
                f"dataset.choices says nothing about format={self.format}. Remove it."
            )
        if len(set(self.choices)) != len(self.choices) or len(self.choices) == 1:
            raise ConfigError(
                f"dataset.choices={list(self.choices)}: give two or more different answers."
            )

    # -- columns -----------------------------------------------------------------------------------
    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Columns that the prompt's template uses."""
        try:
            found = [
                f for _, f, _, _ in string.Formatter().parse(self.prompt or "") if f is not None
            ]
        except ValueError as error:
            raise ConfigError(
                f"dataset.prompt={self.prompt!r}: {error}. Write {{{{ and }}}} for braces."
            ) from error
        wrong = [f for f in found if not f or f.isdigit() or set(f) & set(".[")]
        if wrong:
            raise ConfigError(
                f"dataset.prompt={self.prompt!r}: {{{wrong[0]}}} names no column, as {{text}} "
                "would."
            )
        if self.prompt is not None and not found:
            raise ConfigError(
                f"dataset.prompt={self.prompt!r} uses no column. Write {{text}} where a column "
                "belongs."
            )
        return tuple(found)

    def value(self, row: Row, column: str) -> Any:
        """The value of one of our columns."""
        theirs = self.columns.get(column, column)
        if theirs not in row:
            near = nearest(theirs, row)
            raise DataError(
                f"{row.where}: no column {theirs!r}; it has "
                f"{', '.join(row) or 'none'}.{did_you_mean(theirs, row)} Set "
                f"dataset.columns.{column}={near[0] if near else 'NAME'}."
            )
        return row[theirs]

    def text(self, row: Row, column: str) -> str:
        """The value of one of our columns, which must be text."""
        value = self.value(row, column)
        if not isinstance(value, str):
            raise DataError(
                f"{row.where}: column {self.columns.get(column, column)!r} is {_kind(value)}, "
                "expected text. Quote it in the file, or name another column by "
                f"dataset.columns.{column}."
            )
        return value

    def optional(self, row: Row, column: str) -> str | None:
        """The text of a column that may be missing or empty."""
        absent = column not in self.columns and column not in row
        return None if absent or self.value(row, column) is None else self.text(row, column)

    def filled(self, row: Row) -> str:
        """The prompt's template with the row's values."""
        assert self.prompt is not None
        missing = [f for f in self.fields if f not in row]
        if missing:
            raise DataError(
                f"{row.where}: no column {missing[0]!r}, which dataset.prompt={self.prompt!r} "
                f"uses; it has {', '.join(row)}.{did_you_mean(missing[0], row)}"
            )
        return self.prompt.format_map(row)

    def question(self, row: Row, column: str) -> str:
        """The filled template, or a column where there is none."""
        return self.text(row, column) if self.prompt is None else self.filled(row)

    # -- records -----------------------------------------------------------------------------------
    def record(self, row: Row) -> Record:
        """What the row says."""
        content: Content = getattr(self, f"_{self.format}")(row)
        answers = self.choices if not isinstance(content, Labelled | Picture) else ()
        if answers and answer(content).strip() not in answers:
            raise DataError(
                f"{row.where}: the answer {answer(content)!r} is none of "
                f"dataset.choices={list(answers)}. Correct the row or add it there."
            )
        return Record(row.id, row.where, self._key(row, content), content, answers)

    def _key(self, row: Row, content: Content) -> str:
        if "group" in self.columns:
            return str(self.value(row, "group"))
        if self.prompt is not None:
            return "\0".join(str(row[f]) for f in self.fields)
        if isinstance(content, Picture) and isinstance(content.image, str):
            return os.path.relpath(content.image, self.folder.resolve())
        return question(content)

    def _chat(self, row: Row) -> Chat:
        if self.prompt is None:
            turns = self._messages(row)
        else:
            turns = [
                _turn("user", self.filled(row)),
                _turn("assistant", self.text(row, "completion")),
            ]
        if self.system is not None and turns[0]["role"] not in ("system", "developer"):
            turns = [_turn("system", self.system), *turns]
        if turns[0]["role"] == "assistant":
            raise DataError(
                f"{row.where}: the chat begins with an assistant's turn. Remove it, or set "
                "dataset.system."
            )
        return Chat(tuple(turns))

    def _messages(self, row: Row) -> list[Message]:
        there = {*row, *self.columns}
        named = (
            "conversations" if "conversations" in there and "messages" not in there else "messages"
        )
        messages = self.value(row, named)
        if not isinstance(messages, list) or not messages:
            raise DataError(
                f"{row.where}: {named} is {_kind(messages)}, expected a list of turns (role, "
                "content)."
            )
        return [_message(turn, f"{row.where}, turn {n}") for n, turn in enumerate(messages, 1)]

    def _instruct(self, row: Row) -> Instruct:
        instruction = self.question(row, "instruction")
        given = None if self.prompt is not None else self.optional(row, "input")
        return Instruct(instruction, given or "", self.text(row, "output"), self.system)

    def _prompt_completion(self, row: Row) -> Completion:
        return Completion(self.question(row, "prompt"), self.text(row, "completion"))

    def _text(self, row: Row) -> Text:
        return Text(self.question(row, "text"))

    def _classification(self, row: Row) -> Labelled:
        label = self.value(row, "label")
        return Labelled(
            self.question(row, "text"), self.optional(row, "text_pair"), self._class(row, label)
        )

    def _class(self, row: Row, label: object) -> int | str:
        if isinstance(label, str | int) and label != "":
            return label
        raise DataError(
            f"{row.where}: the label is {_kind(label)}, expected a class's name or whole number."
        )

    def _regression(self, row: Row) -> Labelled:
        label = self.value(row, "label")
        try:
            number = float(label)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"{row.where}: the label is {_kind(label)}, expected a finite number.")
        return Labelled(self.question(row, "text"), self.optional(row, "text_pair"), number)

    def _image_classification(self, row: Row) -> Picture:
        return Picture(self._image(row), self._class(row, self.value(row, "label")))

    def _image(self, row: Row) -> str | bytes:
        image = self.value(row, "image")
        if isinstance(image, dict):  # how `datasets` stores images
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            return image
        if not isinstance(image, str):
            raise DataError(f"{row.where}: the image is {_kind(image)}, expected a path or bytes.")
        path = self.folder / image
        if not path.is_file():
            raise DataError(
                f"{row.where}: there is no image {path}. Paths start from the folder of the data "
                "file."
            )
        return str(path.resolve())


def _kind(value: object) -> str:
    """'the int 5', for messages."""
    return (
        "empty"
        if value is None or value == ""
        else f"the {type(value).__name__} {str(value)[:40]!r}"
    )


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _message(turn: object, where: str) -> Message:
    """A turn as chat templates name it; further keys (tool calls) are kept unless empty."""
    if not isinstance(turn, dict):
        raise DataError(f"{where}: {_kind(turn)}, expected an object with role and content.")
    given = {key: value for key, value in turn.items() if value is not None}
    role = given.pop("role", given.pop("from", None))
    content = given.pop("content", given.pop("value", None))
    known = ROLES.get(str(role), role)
    if known not in KNOWN_ROLES:
        allowed = (*KNOWN_ROLES, *ROLES)
        raise DataError(
            f"{where}: the role is {_kind(role)}, expected one of {', '.join(allowed)}."
        )
    if not isinstance(content, str) and not (content is None and "tool_calls" in given):
        raise DataError(f"{where}: the content is {_kind(content)}, expected text.")
    return {"role": known, "content": content or "", **given}
