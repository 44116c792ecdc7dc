"""Answers of a model: to one prompt, to a file of prompts, or to a person in a chat."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import TextStreamer

from peftcli.build import Parts
from peftcli.data.render import render_prompt
from peftcli.errors import ConfigError, DataError
from peftcli.screen import console

Messages = Sequence[Mapping[str, str]]


def answer(parts: Parts, prompt: str | Messages, max_new_tokens: int, streamer: Any = None) -> str:
    """The model's greedy answer to a prompt, or to the messages of a chat so far."""
    ids = torch.tensor([render_prompt(_asked(parts, prompt), parts.tokenizer)], device=parts.device)
    parts.model.eval()
    with (
        torch.inference_mode(),
        torch.autocast(parts.device.type, parts.autocast, enabled=parts.autocast is not None),
    ):
        out = cast(Any, parts.model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=parts.tokenizer.pad_token_id,
            streamer=streamer,
        )
    new = out[0] if parts.task == "seq2seq" else out[0, ids.shape[1] :]
    return parts.tokenizer.decode(new, skip_special_tokens=True).strip()


def _asked(parts: Parts, prompt: str | Messages) -> str | Messages:
    """What training would have asked: for a chat model the system message of the data, then the
    user's turn.
    """
    if not parts.tokenizer.chat_template:
        return prompt
    system, turns = parts.run.dataset.system, prompt
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if system is None or turns[0]["role"] == "system":
        return turns
    return [{"role": "system", "content": system}, *turns]


def answer_all(
    parts: Parts, prompt: str | None, file: Path | None, max_new_tokens: int, as_json: bool
) -> int:
    """Answer one prompt or every prompt of a file: plain answers, or with `as_json` one object a
    line.
    """
    for given in [prompt] if prompt is not None else read_prompts(file):
        text = answer(parts, given, max_new_tokens)
        print(json.dumps({"prompt": given, "answer": text}) if as_json else text, flush=True)
    return 0


def read_prompts(file: Path | None) -> list[Any]:
    """Prompts of a .txt file (one a line) or a .jsonl file ({"prompt": ...} or {"messages":
    [...]}).
    """
    assert file is not None
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"--file {file}: cannot be read ({e}).") from None
    if file.suffix != ".jsonl":
        return [line for line in lines if line.strip()]
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            prompts.append(row["messages"] if "messages" in row else row["prompt"])
        except (ValueError, KeyError, TypeError):
            raise DataError(
                f'{file}:{number}: expected {{"prompt": ...}} or {{"messages": [...]}}.'
            ) from None
    return prompts


def chat(parts: Parts, max_new_tokens: int) -> int:
    """Talk with the model until an empty line or Ctrl-D."""
    if not sys.stdin.isatty():
        raise ConfigError(
            "generate: give --prompt TEXT or --file FILE, or start it on a terminal to chat."
        )
    console.print("Talk to the model; an empty line or Ctrl-D ends it.", style="dim")
    messages: list[dict[str, str]] = []
    streamer = TextStreamer(
        parts.tokenizer, skip_prompt=parts.task == "causal_lm", skip_special_tokens=True
    )
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            line = ""
        if not line:
            return 0
        messages.append({"role": "user", "content": line})
        given = messages if parts.tokenizer.chat_template else line
        messages.append(
            {"role": "assistant", "content": answer(parts, given, max_new_tokens, streamer)}
        )
