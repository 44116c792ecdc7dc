"""From settings to examples: lengths, targets, labels, statistics, and a cache never stale."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from peftcli.data.examples import Data
from peftcli.errors import ConfigError, DataError
from tests.data.conftest import Files, Prepare

Tok = PreTrainedTokenizerBase
PAIRS = [{"prompt": f"one {i} two", "completion": " three" * (i % 5 + 1)} for i in range(40)]
ENTRY = ("*.safetensors", "*.json")


def contents(data: Data) -> list[dict[str, Any]]:
    """Examples of both sides as plain values."""
    sides = [data.train] if data.eval is None else [data.train, data.eval]
    return [json.loads(json.dumps(e, default=lambda a: a.tolist())) for s in sides for e in s]


# -- examples --------------------------------------------------------------------------------------
def test_examples_know_their_row_their_length_and_their_targets(
    prepare: Prepare, base: Tok, write: Files
) -> None:
    data = prepare(write("a.jsonl", PAIRS), base, eval_samples=10)
    assert (len(data.train), len(data.eval or ())) == (30, 10)
    for i, example in enumerate(data.train):
        row = PAIRS[int(example["id"].removeprefix("a.jsonl:")) - 1]
        assert base.decode(example["input_ids"]) == f"<s>{row['prompt']}{row['completion']}</s>"
        assert data.train.lengths[i] == len(example["input_ids"])
        assert data.train.num_supervised[i] == example["supervised"].sum()
        assert example["input_ids"].dtype == np.int32
        assert example["supervised"].dtype == bool


def test_previews_show_what_is_trained(prepare: Prepare, base: Tok, write: Files) -> None:
    data = prepare(write("a.jsonl", PAIRS[:1]), base)
    preview = data.preview(3)
    assert len(preview) == 1
    assert preview[0].id == "a.jsonl:1"
    assert preview[0].pieces == (("<s>one 0 two", False), (" three</s>", True))


def test_statistics_count_what_the_examples_hold(prepare: Prepare, base: Tok, write: Files) -> None:
    data = prepare(write("a.jsonl", PAIRS), base)
    train = data.stats["train"]
    assert train["examples"] == 40
    assert train["tokens"] == data.train.lengths.sum()
    assert train["max_length"] == data.train.lengths.max()
    assert train["supervised_tokens"] == data.train.num_supervised.sum()
    assert 0 < train["supervised_fraction"] < 1
    assert data.stats["eval"] is None


def test_source_and_target_make_up_an_encoder_decoders_length(
    prepare: Prepare, t5: Tok, write: Files
) -> None:
    data = prepare(write("a.jsonl", PAIRS[:3]), t5, "seq2seq")
    example = data.train[1]
    assert data.train.lengths[1] == len(example["input_ids"]) + len(example["labels"])
    assert data.train.num_supervised[1] == len(example["labels"])
    assert example["choices"] is None


@pytest.mark.parametrize("labels", [[1, 0, 1], ["yes", "no", "yes"]])
def test_labels_are_indices_into_their_sorted_names(
    prepare: Prepare, encoder: Tok, write: Files, labels: list[int | str]
) -> None:
    rows = [{"text": f"one {i}", "text_pair": "two", "label": x} for i, x in enumerate(labels)]
    data = prepare(write("a.jsonl", rows), encoder, "classification")
    assert data.labels == (("0", "1") if labels[0] == 1 else ("no", "yes"))
    assert [e["label"] for e in data.train] == [1, 0, 1]
    assert data.train[0]["token_type_ids"].max() == 1
    assert data.stats["train"]["labels"] == dict(zip(data.labels or (), (1, 2), strict=True))


def test_labels_that_training_has_not_seen_are_errors(
    prepare: Prepare, encoder: Tok, write: Files
) -> None:
    train = write("a.jsonl", [{"text": "one", "label": "yes"}, {"text": "two", "label": "no"}])
    held_out = write("b.jsonl", [{"text": "three", "label": "maybe"}])
    with pytest.raises(DataError, match=r"b.jsonl, line 1: the label 'maybe' .*\(no, yes\)"):
        prepare(train, encoder, "classification", eval_path=str(held_out))


def test_ratings_are_floats(prepare: Prepare, encoder: Tok, write: Files) -> None:
    path = write("a.csv", "text,score\none,-1.5\ntwo,2\n")
    data = prepare(path, encoder, "regression", columns={"label": "score"})
    assert [e["label"] for e in data.train] == [-1.5, 2.0]
    assert data.labels is None


def test_choices_are_counted_and_come_with_every_example(
    prepare: Prepare, chat: Tok, write: Files
) -> None:
    rows = [{"text": f"one {i}", "label": "yes" if i % 3 else "no"} for i in range(12)]
    data = prepare(
        write("a.jsonl", rows),
        chat,
        format="chat",
        prompt="{text}?",
        columns={"completion": "label"},
        choices=("yes", "no"),
    )
    assert data.labels == ("yes", "no")
    assert data.stats["train"]["labels"] == {"yes": 8, "no": 4}
    for example in data.train:
        decoded = [chat.decode(c) for c in example["choices"]]
        assert decoded == ["yes", "no"]
        assert rows[int(example["id"].split(":")[1]) - 1]["label"] == decoded[example["answer"]]


def test_held_out_files_and_splits_are_used_and_leave_training(
    prepare: Prepare, base: Tok, write: Files
) -> None:
    train = write("train.jsonl", [{"text": "one"}, {"text": "two"}])
    write("test.jsonl", [{"text": "two"}, {"text": "three"}])
    for options in ({"eval_path": str(train.with_name("test.jsonl"))}, {"eval_split": "test"}):
        data = prepare(train.parent if "eval_split" in options else train, base, **options)
        assert data.eval is not None
        assert [base.decode(e["input_ids"]) for e in data.train] == ["<s>one</s>"]
        assert len(data.eval) == 2


def test_a_format_that_the_task_cannot_use_is_refused(
    prepare: Prepare, base: Tok, write: Files
) -> None:
    with pytest.raises(ConfigError, match=r"format=text does not go with the task classification"):
        prepare(write("a.jsonl", [{"text": "a"}]), base, "classification", format="text")


# -- length ----------------------------------------------------------------------------------------
LONG = [*PAIRS[:4], {"prompt": "one " * 30, "completion": " two"}]


def test_overlong_examples_are_an_error_that_names_the_length_to_set(
    prepare: Prepare, base: Tok, write: Files
) -> None:
    path = write("a.jsonl", LONG)
    with pytest.raises(
        DataError, match=r"1 of 5 train examples .*a.jsonl, line 5.*max_length="
    ) as e:
        prepare(path, base, max_length=24)
    needed = int(str(e.value).split("Set dataset.max_length=")[1].split(",")[0])
    assert prepare(path, base, max_length=needed).train.lengths.max() == needed


def test_overlong_examples_are_dropped_or_cut_with_counts(
    prepare: Prepare, base: Tok, write: Files
) -> None:
    path = write("a.jsonl", LONG)
    dropped = prepare(path, base, max_length=24, on_overlong="drop")
    assert (len(dropped.train), dropped.stats["train"]["dropped_overlong"]) == (4, 1)
    path = write("a.jsonl", [{"text": "one two three " * 30}])
    cut = prepare(path, base, max_length=24, on_overlong="truncate")
    assert cut.train.lengths.tolist() == [24]
    assert cut.stats["train"]["truncated"] == 1
    assert cut.train[0]["input_ids"][0] == base.bos_token_id


def test_truncation_that_leaves_no_target_is_an_error(
    prepare: Prepare, base: Tok, write: Files
) -> None:
    with pytest.raises(DataError, match=r"a.jsonl, line 5: .*max_length=24 tokens hold no answer"):
        prepare(write("a.jsonl", LONG), base, max_length=24, on_overlong="truncate")


def test_truncation_keeps_an_encoders_end_token(
    prepare: Prepare, encoder: Tok, t5: Tok, write: Files
) -> None:
    options: dict[str, Any] = {"max_length": 12, "on_overlong": "truncate"}
    path = write(
        "a.jsonl", [{"text": "one " * 30, "label": 1, "prompt": "a " * 30, "completion": "b"}]
    )
    ids = prepare(path, encoder, "classification", **options).train[0]["input_ids"]
    assert (len(ids), ids[-1]) == (12, encoder.sep_token_id)
    ids = prepare(path, t5, "seq2seq", **options).train[0]["input_ids"]
    assert (len(ids), ids[-1]) == (12, t5.eos_token_id)


def test_examples_without_targets_are_errors_or_counted(
    prepare: Prepare, chat: Tok, write: Files
) -> None:
    asked = {"role": "user", "content": "one"}
    answered = {"role": "assistant", "content": "two"}
    path = write("a.jsonl", [{"messages": [asked, answered]}, {"messages": [asked]}])
    with pytest.raises(DataError, match=r"a.jsonl, line 2: no token of this example is a target"):
        prepare(path, chat)
    data = prepare(path, chat, on_overlong="drop")
    assert (len(data.train), data.stats["train"]["dropped_without_targets"]) == (1, 1)
    with pytest.raises(DataError, match=r"No train examples are left: 0 of 1 .* 1 have no targets"):
        prepare(write("a.jsonl", [{"messages": [asked]}]), chat, on_overlong="drop")


# -- the cache -------------------------------------------------------------------------------------
def test_a_second_time_comes_from_the_cache_with_the_same_examples(
    prepare: Prepare, base: Tok, write: Files
) -> None:
    path = write("a.jsonl", PAIRS)
    first, second = prepare(path, base, eval_samples=5), prepare(path, base, eval_samples=5)
    assert (first.stats["cached"], second.stats["cached"]) == (False, True)
    assert (first.key, first.hash) == (second.key, second.hash)
    assert contents(first) == contents(second)
    assert isinstance(second.train[0]["input_ids"].base, np.ndarray)
    assert not second.train[0]["input_ids"].flags.writeable


def test_every_task_reads_back_what_was_prepared(
    prepare: Prepare, encoder: Tok, t5: Tok, chat: Tok, write: Files
) -> None:
    rows = [{"text": f"one {i}", "label": i % 2, **PAIRS[i]} for i in range(8)]
    path = write("a.jsonl", rows)
    for tokenizer, task in ((encoder, "classification"), (encoder, "regression"), (t5, "seq2seq")):
        cold, warm = prepare(path, tokenizer, task), prepare(path, tokenizer, task)
        assert warm.stats["cached"]
        assert contents(cold) == contents(warm)


def test_whatever_the_examples_depend_on_changes_the_key(
    prepare: Prepare, base: Tok, chat: Tok, write: Files
) -> None:
    path = write("a.jsonl", PAIRS)
    other = deepcopy(chat)
    other.chat_template = str(other.chat_template).replace("assistant", "model")
    more = deepcopy(base)
    more.add_tokens(["three"])
    keys = [prepare(path, t).key for t in (base, chat, other, more)]
    options = ({"train_on": "all"}, {"max_length": 99}, {"seed": 1}, {"eval_samples": 4})
    keys += [prepare(path, base, **o).key for o in options]
    write("a.jsonl", [*PAIRS[:-1], {"prompt": "new", "completion": " row"}])
    keys.append(prepare(path, base).key)
    assert len(set(keys)) == len(keys)


def test_what_the_examples_do_not_depend_on_keeps_the_key(
    prepare: Prepare, base: Tok, write: Files
) -> None:
    path = write("a.jsonl", PAIRS)
    key = prepare(path, base).key
    base(["one", "two three"], padding=False, truncation=True, max_length=2)
    for options in ({"packing": False}, {"group_by_length": True}, {"num_proc": 2}):
        assert prepare(path, base, **options).key == key


@pytest.mark.parametrize("pattern", ENTRY)
@pytest.mark.parametrize("damage", ["empty", "short", "flipped"])
def test_a_damaged_entry_is_made_again_with_a_note(
    prepare: Prepare, base: Tok, write: Files, tmp_path: Path, pattern: str, damage: str
) -> None:
    path = write("a.jsonl", PAIRS)
    first = prepare(path, base)
    expected = contents(first)  # now: the mapped file is about to change under it
    (entry,) = (tmp_path / "cache").glob(pattern)
    good = entry.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 0x80]) + good[middle + 1 :]
    entry.write_bytes({"empty": b"", "short": good[:-1], "flipped": flipped}[damage])
    again = prepare(path, base)
    if pattern == "*.safetensors" or damage != "flipped":  # a flipped bit may fall into a number
        assert not again.stats["cached"]
        assert "were made again: " in again.stats["notes"][0]
    assert again.hash == first.hash
    assert contents(again) == expected
    assert prepare(path, base).stats["cached"]


def test_a_lost_half_of_an_entry_is_made_again(
    prepare: Prepare, base: Tok, write: Files, tmp_path: Path
) -> None:
    path = write("a.jsonl", PAIRS)
    for pattern in ENTRY:
        first = prepare(path, base)
        next((tmp_path / "cache").glob(pattern)).unlink()
        again = prepare(path, base)
        assert not again.stats["cached"]
        assert again.hash == first.hash


def test_two_at_once_prepare_one_entry(prepare: Prepare, base: Tok, write: Files) -> None:
    path = write("a.jsonl", PAIRS)
    with ThreadPoolExecutor(4) as pool:
        data = list(pool.map(lambda _: prepare(path, deepcopy(base)), range(4)))
    assert len({d.hash for d in data}) == 1


def test_a_warm_start_is_quick_and_needs_no_datasets(
    prepare: Prepare, base: Tok, write: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.jsonl", [{"text": f"one two three {i}"} for i in range(10_000)])
    prepare(path, base)
    for name in ("datasets", "pyarrow", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises
    started = time.perf_counter()
    assert prepare(path, base).stats["cached"]
    assert time.perf_counter() - started < 0.5  # 0.01 s on an idle machine


def test_several_processes_make_the_same_examples(
    prepare: Prepare, base: Tok, write: Files, tmp_path: Path
) -> None:
    rows = [{"text": f"one two three {i}"} for i in range(2100)]
    alone = prepare(write("a.jsonl", rows), base)
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    together = prepare(tmp_path / "a.jsonl", base, num_proc=2)
    assert not together.stats["cached"]
    assert together.hash == alone.hash


def test_ten_thousand_examples_are_prepared_in_seconds(
    prepare: Prepare, chat: Tok, write: Files
) -> None:
    rows = [{"prompt": f"one {i}", "completion": " two"} for i in range(10_000)]
    started = time.perf_counter()
    assert len(prepare(write("a.jsonl", rows), chat).train) == 10_000
    assert time.perf_counter() - started < 10
