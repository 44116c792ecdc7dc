"""The data sets that come with the package: human-rated sentences of Hutto and Gilbert (ICWSM 2014,
MIT licence).

10,605 movie-review sentences, 3,708 product-review and 5,190 editorial sentences, and 4,200 tweets,
each rated by 15 to 99 people from -4 (extremely negative) to 4 (extremely positive). A row has
`id`, `text`, `rating` (the mean) and `label`: positive or negative by the mean's sign, None where
it is nearer to zero than 0.25, so unclear. Formats with answers drop the unclear rows (movies 230,
products 467, editorials 1,289, tweets 371), regression keeps all.

`<name>_raters` has one row a rating instead: `rating` is one person's, and `label` its sign (None
for 0). The movie reviews also tell who: blocks of 30 sentences share their raters (the ratings at
one place correlate by 0.34 inside a block and by 0 across), so `rater` is `block-place`. The other
sets list each sentence's ratings in an order of its own.
"""

from __future__ import annotations

import bz2
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from peftcli.data.files import Row
from peftcli.settings import Dataset, Task

FOLDER = Path(__file__).with_suffix("")
UNCLEAR = 0.25  # means nearer to zero have no label
BLOCK = 30  # consecutive movie reviews with the same raters
QUESTIONS = {
    "movie_reviews": "Is this movie review positive or negative?",
    "product_reviews": "Is this product review positive or negative?",
    "editorials": "Is this sentence positive or negative?",
    "tweets": "Is this tweet positive or negative?",
}
NAMES = (*QUESTIONS, *(f"{name}_raters" for name in QUESTIONS))


def file_of(name: str) -> Path:
    """The packed file of an embedded set."""
    return FOLDER / f"{name.removesuffix('_raters')}.jsonl.bz2"


def rows(name: str) -> list[Row]:
    """All rows of an embedded set, unclear ones included."""
    with bz2.open(file_of(name), "rt", encoding="utf-8") as lines:
        sentences = [json.loads(line) for line in lines]
    made = _by_rater(name, sentences) if name.endswith("_raters") else map(_mean, sentences)
    return [Row(values, name, n) for n, values in enumerate(made, 1)]


def _mean(sentence: dict[str, str]) -> dict[str, Any]:
    ratings = _ratings(sentence)
    mean = sum(ratings) / len(ratings)
    return {"id": sentence["id"], "text": sentence["text"], "rating": mean, "label": _label(mean)}


def _by_rater(name: str, sentences: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    for n, sentence in enumerate(sentences):
        for place, rating in enumerate(_ratings(sentence)):
            row = {
                "id": sentence["id"],
                "text": sentence["text"],
                "rating": rating,
                "label": _label(rating),
            }
            yield (
                {**row, "rater": f"{n // BLOCK}-{place}"} if name == "movie_reviews_raters" else row
            )


def _ratings(sentence: dict[str, str]) -> list[int]:
    return [int(digit) - 4 for digit in sentence["ratings"]]


def _label(rating: float) -> str | None:
    if abs(rating) < UNCLEAR:
        return None
    return "positive" if rating > 0 else "negative"


def complete(cfg: Dataset, task: Task) -> Dataset:
    """The settings with what an embedded set implies filled in where they say nothing."""
    assert cfg.path in NAMES
    by_rater = cfg.path.endswith("_raters")
    columns = {"group": "text", **cfg.columns} if by_rater else cfg.columns
    if task == "regression":
        return replace(cfg, format="regression", columns={"label": "rating", **columns})
    if task == "classification":
        return replace(cfg, format="classification", columns=columns)
    if cfg.format == "text":
        return replace(cfg, columns=columns)
    chat = cfg.format in ("auto", "chat")
    question = QUESTIONS[cfg.path.removesuffix("_raters")]
    return replace(
        cfg,
        format="chat" if chat else cfg.format,
        system=question if chat and cfg.system is None else cfg.system,
        prompt=cfg.prompt or ("{text}" if chat else f"{question}\n{{text}}\nAnswer:"),
        columns={"output" if cfg.format == "instruct" else "completion": "label", **columns},
        choices=cfg.choices or ("negative", "positive"),
    )
