"""The one place where text becomes token ids and says which of them are targets; training,
evaluation and generation use it.

A chat is rendered to one string and tokenised once, without added special tokens, since templates
write their own. Where an answer stands is known from renderings of the turns before it: turn i is
what `messages[:i + 1]` adds to `messages[:i]` with the generation prompt, up to its end-of-turn
token. Nothing is ever searched for. Plain text gets the tokens that the tokenizer puts in front by
default, once, and ends with its end-of-text token, which is a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
from transformers import PreTrainedTokenizerBase

from peftcli.data.records import (
    Chat,
    Completion,
    Content,
    Instruct,
    Labelled,
    Message,
    Record,
    Text,
    answer,
    with_answer,
)
from peftcli.errors import ConfigError, DataError

# our own words in the layout of Alpaca (Taori et al. 2023), where there is no chat template
PLAIN_SYSTEM = "Do what the instruction says. Write only the answer."


class Layout(NamedTuple):
    """A string and the character ranges of its answers, end-of-turn tokens included."""

    text: str
    answers: tuple[tuple[int, int], ...]
    has_last: bool  # whether the string ends with the last of the answers
    plain: bool  # begin and end tokens are put around it; the end is the character behind the text


class Tokens(NamedTuple):
    """Ids (T,), and the character of the layout at which each of them begins and ends (T,)."""

    layout: Layout
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def inside(self, span: tuple[int, int]) -> np.ndarray:
        """Tokens (T,) that have a part in a range of characters."""
        return (self.ends > span[0]) & (self.starts < span[1])

    @property
    def prompt_length(self) -> int:
        """Tokens that end before the last answer begins."""
        return int(np.count_nonzero(self.ends <= self.layout.answers[-1][0]))


class Rendered(NamedTuple):
    """Ids (T,), which are targets (T,), where the last answer begins, its choices, the right."""

    input_ids: np.ndarray
    supervised: np.ndarray
    prompt_length: int | None
    choices: list[np.ndarray] | None
    answer: int | None


class Pair(NamedTuple):
    """Source (S,) and target (T,) of an encoder-decoder, with the choices."""

    input_ids: np.ndarray
    labels: np.ndarray
    choices: list[np.ndarray] | None
    answer: int | None


class Encoded(NamedTuple):
    """Input of a classifier (T,)."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None


@dataclass(frozen=True)
class Renderer:
    """Renders records for one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    train_on: Literal["completion", "all", "last"] = "completion"

    # -- what the tokenizer is ---------------------------------------------------------------------
    @cached_property
    def has_template(self) -> bool:
        """Whether chats can be rendered."""
        return self.tokenizer.chat_template is not None

    @cached_property
    def begin(self) -> list[int]:
        """The ids that the tokenizer puts before plain text by default."""
        return self._around[0]

    @cached_property
    def _around(self) -> tuple[list[int], list[int]]:
        whole, bare = (
            self.tokenizer("a").input_ids,
            self.tokenizer("a", add_special_tokens=False).input_ids,
        )
        starts = range(len(whole) - len(bare) + 1)
        start = next(i for i in starts if whole[i : i + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]

    @cached_property
    def eos(self) -> int:
        """The token that ends plain text."""
        given = self.tokenizer.eos_token_id, self.tokenizer.sep_token_id
        eos = next((token for token in given if isinstance(token, int)), None)
        if eos is None:
            raise ConfigError(
                f"The tokenizer {self.tokenizer.name_or_path!r} has no end-of-text token, so a "
                "model could never learn to stop. Name another by model.tokenizer."
            )
        return eos

    @cached_property
    def stops(self) -> frozenset[int]:
        """Tokens that may end a turn: all that are no plain text."""
        return frozenset(self.tokenizer.added_tokens_decoder) | frozenset(
            self.tokenizer.all_special_ids
        )

    # -- strings -----------------------------------------------------------------------------------
    def chat(self, messages: Sequence[Message], prompt: bool = False) -> str:
        """The template's rendering; with `prompt`, up to where the next answer begins."""
        if not self.has_template:
            raise ConfigError(
                f"The tokenizer {self.tokenizer.name_or_path!r} has no chat template, as base "
                "models have none. Give one by model.chat_template=FILE.jinja, or use "
                "dataset.format=prompt_completion, instruct or text."
            )
        rendered = self.tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=prompt
        )
        assert isinstance(rendered, str)
        return rendered

    def layout(self, content: Content, where: str) -> Layout:
        """The string of a content, and where its answers stand."""
        if isinstance(content, Text):
            return Layout(content.text, ((0, len(content.text) + 1),), False, True)
        if isinstance(content, Instruct):
            content = self.instruct(content)
        if isinstance(content, Completion):
            prompt = content.prompt.rstrip(" ")  # tokenizers join a space to the word behind it
            text = content.prompt + content.completion
            return Layout(text, ((len(prompt), len(text) + 1),), True, True)
        assert isinstance(content, Chat)
        try:
            return self._chat_layout(content.messages, where)
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: the chat template refuses this chat: {error}") from error

    def instruct(self, content: Instruct) -> Chat | Completion:
        """As a chat where there is a template, else plain."""
        given = f"\n\n{content.input}" if content.input else ""
        if self.has_template:
            system = (
                [] if content.system is None else [{"role": "system", "content": content.system}]
            )
            user = {"role": "user", "content": content.instruction + given}
            return Chat((*system, user, {"role": "assistant", "content": content.output}))
        given = f"\n\n### Input:\n{content.input}" if content.input else ""
        head = f"{content.system or PLAIN_SYSTEM}\n\n### Instruction:\n{content.instruction}{given}"
        return Completion(f"{head}\n\n### Response:\n", content.output)

    def _chat_layout(self, messages: Sequence[Message], where: str) -> Layout:
        text = self.chat(messages)
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        if self.train_on == "last":
            turns = turns[-1:]
        answers = tuple(self._turn(messages, i, text, where) for i in turns)
        return Layout(text, answers, messages[-1]["role"] == "assistant", False)

    def _turn(self, messages: Sequence[Message], i: int, text: str, where: str) -> tuple[int, int]:
        before = self.chat(messages[:i], prompt=True)
        after = (text if i + 1 == len(messages) else self.chat(messages[: i + 1])).rstrip()
        if text.startswith(before) and text.startswith(after) and len(before) <= len(after):
            return len(before), len(after)
        cure = "dataset.train_on=last, or " if i + 1 < len(messages) else ""
        raise DataError(
            f"{where}, turn {i + 1}: the chat template writes this turn differently once others "
            "follow, or begins answers differently than its generation prompt does, so what is "
            f"trained would not be what is generated. Use {cure}another template by "
            "model.chat_template=FILE.jinja."
        )

    def _other(self, layout: Layout, content: Content, where: str) -> Layout:
        """The layout of the same prompt with another last answer."""
        if isinstance(content, Instruct):
            content = self.instruct(content)
        if not isinstance(content, Chat):
            return self.layout(content, where)
        text, start = self.chat(content.messages), layout.answers[-1][0]
        assert text.startswith(layout.text[:start])
        return Layout(text, ((start, len(text.rstrip())),), True, False)

    # -- decoders ----------------------------------------------------------------------------------
    def decoder(self, records: Sequence[Record]) -> list[Rendered]:
        """Ids and targets of many records; the last answer's choices continue the same prompt."""
        layouts: list[Layout] = []
        for record in records:
            layout = self.layout(record.content, record.where)
            layouts += [layout, *(self._other(layout, c, record.where) for c in _others(record))]
        encoded = iter(self._encode(layouts))
        return [self._rendered(record, encoded) for record in records]

    def _encode(self, layouts: Sequence[Layout]) -> Iterator[Tokens]:
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f"The tokenizer {self.tokenizer.name_or_path!r} tells no offsets. Use one with a "
                "tokenizer.json (model.tokenizer)."
            )
        texts = [layout.text for layout in layouts]
        batch = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        for layout, encoding in zip(layouts, batch.encodings or (), strict=True):
            ids = np.array(encoding.ids, np.int32)
            offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
            if layout.plain:
                ids, offsets = self._surround(ids, offsets, len(layout.text))
            yield Tokens(layout, ids, offsets[:, 0], offsets[:, 1])

    def _surround(
        self, ids: np.ndarray, offsets: np.ndarray, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Begin tokens before and the end token behind plain text, unless the text has them."""
        begin = [] if ids[: len(self.begin)].tolist() == self.begin else self.begin
        end = [] if len(ids) and ids[-1] == self.eos else [self.eos]
        edges = np.zeros((len(begin), 2)), offsets, np.full((len(end), 2), (size, size + 1))
        return np.concatenate([begin, ids, end]).astype(np.int32), np.concatenate(edges).astype(
            np.int32
        )

    def _rendered(self, record: Record, encoded: Iterator[Tokens]) -> Rendered:
        tokens = next(encoded)
        layout, ids = tokens.layout, tokens.ids
        supervised = np.full(len(ids), self.train_on == "all")
        for span in layout.answers:
            inside = tokens.inside(span)
            self._check_stop(ids[inside], record.where)
            supervised |= inside
        supervised[:1] = False  # nothing predicts the first token
        if not layout.has_last:
            return Rendered(ids, supervised, None, None, None)
        if not record.choices:
            return Rendered(ids, supervised, tokens.prompt_length, None, None)
        right = record.choices.index(answer(record.content).strip())
        others = [next(encoded) for _ in record.choices[1:]]
        prompt = ids[: tokens.prompt_length]
        if not len(prompt) or any(
            not np.array_equal(prompt, o.ids[: o.prompt_length]) for o in others
        ):
            raise DataError(
                f"{record.where}: the answers of dataset.choices do not continue the same prompt "
                "tokens. Let the prompt end with a space, a line break or punctuation."
            )
        tails = [self._choice(o) for o in (*others[:right], tokens, *others[right:])]
        return Rendered(ids, supervised, tokens.prompt_length, tails, right)

    def _check_stop(self, ids: np.ndarray, where: str) -> None:
        if not len(ids) or int(ids[-1]) not in self.stops:
            raise ConfigError(
                f"{where}: the chat template writes no end-of-turn token behind answers, so a "
                "model could never learn to stop. Give a template by model.chat_template that "
                f"ends assistant turns with {{{{ eos_token }}}}."
            )

    def _choice(self, tokens: Tokens) -> np.ndarray:
        """The last answer without what ends the turn."""
        last = int(np.flatnonzero(tokens.inside(tokens.layout.answers[-1]))[-1])
        while last >= tokens.prompt_length and int(tokens.ids[last]) in self.stops:
            last -= 1
        return tokens.ids[tokens.prompt_length : last + 1]

    def prompt(self, prompt: Sequence[Message] | str) -> list[int]:
        """The ids to generate from: a chat up to its next answer, or plain text."""
        if not isinstance(prompt, str):
            text = self.chat(prompt, prompt=True)
            return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        ids = list(
            self.tokenizer(prompt.rstrip(" "), add_special_tokens=False, verbose=False).input_ids
        )
        return ids if ids[: len(self.begin)] == self.begin else [*self.begin, *ids]

    # -- encoders ----------------------------------------------------------------------------------
    def seq2seq(self, records: Sequence[Record]) -> list[Pair]:
        """Source and target ids; chats are plain text here, a line a turn."""
        sources, targets = [], []
        for record in records:
            source, target = self._source_and_target(record.content, record.where)
            sources.append(source)
            targets += [
                target,
                *(self._source_and_target(c, record.where)[1] for c in _others(record)),
            ]
        source_ids = iter(self.tokenizer(sources, verbose=False).input_ids)
        target_ids = iter(self.tokenizer(text_target=targets, verbose=False).input_ids)
        return [self._pair(record, next(source_ids), target_ids) for record in records]

    def _pair(self, record: Record, source: list[int], targets: Iterator[list[int]]) -> Pair:
        target = next(targets)
        labels = target if target[-1:] == [self.eos] else [*target, self.eos]
        ids, labels = np.array(source, np.int32), np.array(labels, np.int32)
        if not record.choices:
            return Pair(ids, labels, None, None)
        right = record.choices.index(answer(record.content).strip())
        others = [next(targets) for _ in record.choices[1:]]
        tails = [
            np.array(self._without_end(t), np.int32)
            for t in (*others[:right], target, *others[right:])
        ]
        return Pair(ids, labels, tails, right)

    def _without_end(self, ids: list[int]) -> list[int]:
        end = self._around[1]
        return ids[: -len(end)] if end and ids[-len(end) :] == end else ids

    def _source_and_target(self, content: Content, where: str) -> tuple[str, str]:
        if isinstance(content, Chat):
            *asked, last = content.messages
            if last["role"] != "assistant":
                raise DataError(
                    f"{where}: the chat ends without an answer, so there is no target. Remove the "
                    "row."
                )
            return "\n".join(m["content"] for m in asked), last["content"]
        if isinstance(content, Instruct):
            asked = (content.system, content.instruction, content.input)
            return "\n".join(part for part in asked if part), content.output
        assert isinstance(content, Completion)
        return content.prompt, content.completion

    def classifier(self, records: Sequence[Record], max_length: int | None = None) -> list[Encoded]:
        """Inputs of a classifier, cut to `max_length` such that the end token stays."""
        contents = [r.content for r in records if isinstance(r.content, Labelled)]
        texts: list[Any] = [
            c.text if c.text_pair is None else (c.text, c.text_pair) for c in contents
        ]
        types = "token_type_ids" in self.tokenizer.model_input_names
        cut = {"truncation": True, "max_length": max_length} if max_length else {}
        batch = self.tokenizer(
            texts, return_token_type_ids=types, return_attention_mask=False, verbose=False, **cut
        )
        kinds = batch["token_type_ids"] if types else [None] * len(texts)
        return [
            Encoded(np.array(ids, np.int32), None if kind is None else np.array(kind, np.int32))
            for ids, kind in zip(batch.input_ids, kinds, strict=True)
        ]


def _others(record: Record) -> list[Content]:
    """The record's content with each of the wrong answers."""
    if not record.choices:
        return []
    right = answer(record.content).strip()
    return [with_answer(record.content, choice) for choice in record.choices if choice != right]


def render_prompt(prompt: Sequence[Message] | str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids to generate from: messages up to the next answer, or plain text.

    They are what training saw before the answer.
    """
    return Renderer(tokenizer).prompt(prompt)
