"""What a row says, whatever its file calls it: the record and the six kinds of content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from peftcli.errors import DataError

Message = Mapping[str, Any]  # role, content


class Chat(NamedTuple):
    """Turns; every assistant turn is an answer."""

    messages: tuple[Message, ...]


class Instruct(NamedTuple):
    """A task with optional input; laid out by the chat template where there is one."""

    instruction: str
    input: str
    output: str
    system: str | None


class Completion(NamedTuple):
    """Plain text in two parts."""

    prompt: str
    completion: str


class Text(NamedTuple):
    """Plain text, all of it to be learnt."""

    text: str


class Labelled(NamedTuple):
    """Text with a class's name or number, or a rating."""

    text: str
    text_pair: str | None
    label: int | str | float


class Picture(NamedTuple):
    """An image file or its bytes, with a class's name or number."""

    image: str | bytes
    label: int | str


Content = Chat | Instruct | Completion | Text | Labelled | Picture


class Record(NamedTuple):
    """What a row says; `key` is what the split goes by."""

    id: str
    where: str
    key: str
    content: Content
    choices: tuple[str, ...] = ()


def answer(content: Content) -> str:
    """The last answer of a content that has one."""
    if isinstance(content, Chat):
        last = content.messages[-1]
        return last["content"] if last["role"] == "assistant" else ""
    if isinstance(content, Instruct):
        return content.output
    assert isinstance(content, Completion)
    return content.completion


def with_answer(content: Content, choice: str) -> Content:
    """The same with another last answer, behind the white space that the first has."""
    old = answer(content)
    new = old[: len(old) - len(old.lstrip())] + choice
    if isinstance(content, Chat):
        return Chat((*content.messages[:-1], {**content.messages[-1], "content": new}))
    if isinstance(content, Instruct):
        return content._replace(output=new)
    assert isinstance(content, Completion)
    return content._replace(completion=new)


def question(content: Content) -> str:
    """What is asked, without what is answered."""
    if isinstance(content, Chat):
        turns = [m for m in content.messages if m["role"] not in ("system", "developer")]
        asked = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
        return "\0".join(f"{m['role']}\0{m['content']}" for m in asked)
    if isinstance(content, Instruct):
        return f"{content.instruction}\0{content.input}"
    if isinstance(content, Completion):
        return content.prompt
    if isinstance(content, Picture):
        return hashlib.sha256(
            content.image if isinstance(content.image, bytes) else content.image.encode()
        ).hexdigest()
    pair = content.text_pair if isinstance(content, Labelled) else None
    return content.text if pair is None else f"{content.text}\0{pair}"


def class_names(
    labels: Sequence[int | str], where: Sequence[str], choices: tuple[str, ...]
) -> tuple[str, ...]:
    """The classes: as in `dataset.choices`, else numbers by size and names by the alphabet."""
    if choices:
        return choices
    kinds = {isinstance(label, str): place for label, place in zip(labels, where, strict=True)}
    if len(kinds) > 1:
        raise DataError(
            f"Labels are text at {kinds[True]} but numbers at {kinds[False]}. Use one kind."
        )
    names = {str(label) for label in labels}
    return tuple(
        sorted(names, key=int) if all(_is_number(name) for name in names) else sorted(names)
    )


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
