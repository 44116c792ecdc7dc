"""Evaluation on held-out examples: loss and perplexity, answer choices, labels, ratings, and free
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from peftcli.data.collate import Collator
from peftcli.dist.ranks import Ranks
from peftcli.settings import Task
from peftcli.train import objective
from peftcli.train.metrics import Metrics, Part


class Indexed(Protocol):
    """Examples by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


Tick = Callable[[int], None]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    examples: Indexed,
    lengths: np.ndarray,
    collate: Collator,
    batch_size: int,
    tick: Tick = lambda n: None,
    ranks: Ranks | None = None,
) -> dict[str, float]:
    """Metrics over all examples, in batches of similar length; `tick` is told how many examples
    were seen.

    The model is in evaluation mode meanwhile, and in the mode it was in afterwards. Scores do not
    depend on the batch size: padding is masked, and packed rows see only themselves. The `ranks`
    take turns with the batches and put what they measured together in the batches' order, so that
    all have the metrics of one process; one without a batch in the last turn repeats the last.
    """
    ranks = ranks or Ranks()
    was_training, device = model.training, next(model.parameters()).device
    metrics = Metrics(task)
    model.eval()
    batches = list(_by_length(lengths, batch_size))
    parts: list[Part] = []
    try:
        for first in range(0, len(batches), ranks.size):
            rows = batches[min(first + ranks.rank, len(batches) - 1)]
            batch = collate([examples[i] for i in rows]).to(device)
            logits = objective.predict(model, batch)
            losses = objective.losses(task, logits, batch.targets)
            parts.append(metrics.measure(batch, logits, losses))
            tick(sum(map(len, batches[first : first + ranks.size])))
    finally:
        model.train(was_training)
    turns = zip(*ranks.exchange(parts), strict=True)
    for part in [part for turn in turns for part in turn][: len(batches)]:
        metrics.add(part)
    return metrics.compute()


def _by_length(lengths: np.ndarray, batch_size: int) -> Iterator[list[int]]:
    order = np.argsort(-lengths, kind="stable").tolist()
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.no_grad()
def answer_freely(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Any],
    max_new_tokens: int,
    encoder_decoder: bool,
    tick: Tick = lambda n: None,
) -> dict[str, float]:
    """Greedy answers to the prompts: `exact_match` with the right completion, and the share that
    `stopped` by themselves.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    matched = stopped = 0
    try:
        for example in examples:
            prompt, wanted = prompt_and_answer(example, encoder_decoder)
            ids = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
            new = out[0, 0 if encoder_decoder else ids.shape[1] :]
            matched += _text(tokenizer, new) == _text(tokenizer, wanted)
            stopped += len(new) < max_new_tokens
            tick(1)
    finally:
        model.train(was_training)
    return {"exact_match": matched / len(examples), "stopped": stopped / len(examples)}


def prompt_and_answer(example: Any, encoder_decoder: bool) -> tuple[np.ndarray, np.ndarray]:
    """The ids that ask and the ids that answer: a decoder's prompt ends before its first target."""
    if encoder_decoder:
        return example["input_ids"], example["labels"]
    first = example["prompt_length"] or int(np.flatnonzero(example["supervised"])[0])
    ids, targets = example["input_ids"], example["supervised"]
    return ids[:first], ids[first:][targets[first:]]


def _text(tokenizer: Any, ids: Any) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True).strip()
