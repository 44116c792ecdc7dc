"""The embedded sets hold what the paper says."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from peftcli.data import embedded
from tests.data.conftest import Prepare

COUNTS = {"movie_reviews": 10_605, "product_reviews": 3_708, "editorials": 5_190, "tweets": 4_200}


@pytest.mark.parametrize("name", COUNTS)
def test_sets_have_the_published_numbers_of_rated_sentences(name: str) -> None:
    rows = embedded.rows(name)
    assert len(rows) == COUNTS[name]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(-4 <= row["rating"] <= 4 and row["text"].strip() for row in rows)


def test_the_mean_is_that_of_the_ratings_where_the_published_files_disagree() -> None:
    second = embedded.rows("tweets")[1]
    assert second["text"] == "Yay. Another good phone interview."
    assert second["rating"] == pytest.approx(2.262626263)  # the other file says 1.443298969


def test_texts_have_no_html_entities_and_keep_their_accents() -> None:
    texts = [row["text"] for name in COUNTS for row in embedded.rows(name)]
    assert not any(entity in text for text in texts for entity in ("&amp;", "&lt;", "&gt;"))
    assert any("\u00e9" in text for text in texts)


def test_labels_are_signs_and_unclear_means_have_none() -> None:
    for row in embedded.rows("editorials"):
        unclear = abs(row["rating"]) < 0.25
        sign = "positive" if row["rating"] > 0 else "negative"
        assert row["label"] == (None if unclear else sign)


def test_raters_have_one_row_a_rating_and_rate_blocks_of_thirty() -> None:
    rows = embedded.rows("movie_reviews_raters")
    assert len(rows) == 198_810
    assert None not in {row["rating"] for row in rows}
    assert len({row["id"] for row in rows if row["rater"] == "7-3"}) == 30


def test_every_format_works_on_a_set(
    prepare: Prepare, chat: PreTrainedTokenizerBase, t5: PreTrainedTokenizerBase
) -> None:
    few = {"train_samples": 40, "eval_samples": 20, "on_overlong": "drop"}
    assert prepare("tweets", chat, **few).labels == ("negative", "positive")
    assert prepare("tweets", chat, "classification", **few).labels == ("negative", "positive")
    assert prepare("tweets", chat, "regression", **few).labels is None
    assert prepare("tweets", chat, format="prompt_completion", **few).train[0]["choices"]
    assert prepare("tweets", chat, format="instruct", **few).train[0]["choices"]
    assert prepare("tweets", chat, format="text", **few).train[0]["choices"] is None
    assert prepare("tweets", t5, "seq2seq", **few).train[0]["choices"]


def test_the_same_sentences_are_held_out_whatever_the_format(
    prepare: Prepare, chat: PreTrainedTokenizerBase
) -> None:
    options = {"eval_fraction": 0.02, "train_samples": 50}
    asked, named, rated = (
        prepare("tweets", chat, task, **options).eval
        for task in ("causal_lm", "classification", "regression")
    )
    assert asked is not None
    assert named is not None
    assert rated is not None
    ids = [{example["id"] for example in side} for side in (asked, named, rated)]
    assert ids[0] == ids[1]
    assert ids[0] < ids[2]


def test_no_sentence_of_the_raters_is_on_both_sides(
    prepare: Prepare, chat: PreTrainedTokenizerBase
) -> None:
    data = prepare(
        "product_reviews_raters",
        chat,
        "regression",
        prompt="{text}",
        train_samples=300,
        eval_samples=100,
    )
    assert data.eval is not None
    train, held_out = ({bytes(e["input_ids"]) for e in side} for side in (data.train, data.eval))
    assert not train & held_out
