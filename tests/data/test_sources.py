"""Every kind of file gives the same rows, and every broken one says where and what to change."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerBase

from peftcli.data.files import Row, read_file
from peftcli.data.sources import Hub, locate
from peftcli.errors import ConfigError, DataError
from peftcli.settings import Dataset
from tests.data.conftest import Files, Prepare

ROWS = [{"text": "eins, zwei", "label": "a"}, {"text": "dr\u00e9i\nvier", "label": "b"}]
CSV = 'text,label\n"eins, zwei",a\n"dr\u00e9i\nvier",b\n'


def rows_of(path: Path, split: str = "train", **options: Any) -> list[Row]:
    """What a path gives."""
    return locate(str(path), Dataset(**options), split, path.parent / "cache").read()


def lines(rows: list[dict[str, str]]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines(ROWS)),
        ("a.jsonl.gz", gzip.compress(lines(ROWS), mtime=0)),
        ("a.jsonl", b"\xef\xbb\xbf" + lines(ROWS)),
        ("a.jsonl", lines(ROWS).replace(b"\n", b"\r\n") + b"\n\n"),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps({"data": ROWS}, indent=1).encode()),
        ("a.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.csv", CSV.encode()),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(write: Files, name: str, content: bytes) -> None:
    assert rows_of(write(name, content)) == ROWS


def test_parquet_and_saved_data_sets_give_the_same_rows(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    saved = datasets.Dataset.from_list([*ROWS, ROWS[0]]).select([0, 1])
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select([1])}).save_to_disk(
        str(tmp_path / "many")
    )
    assert rows_of(tmp_path / "a.parquet") == rows_of(tmp_path / "one") == ROWS
    assert rows_of(tmp_path / "many") == ROWS
    assert rows_of(tmp_path / "many", "test") == ROWS[1:]
    with pytest.raises(DataError, match="no split 'validation'; it has train, test"):
        rows_of(tmp_path / "many", "validation")


def test_label_numbers_of_saved_data_sets_become_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    saved = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, -1]}, features)
    saved.save_to_disk(str(tmp_path / "saved"))
    assert [row["label"] for row in rows_of(tmp_path / "saved")] == ["yes", "no", None]


def test_rows_know_their_first_line(write: Files) -> None:
    assert [row.where for row in rows_of(write("a.csv", CSV))] == ["a.csv, line 2", "a.csv, line 3"]
    spaced = write("a.jsonl", b"\n" + lines(ROWS[:1]) + b"\n" + lines(ROWS[1:]))
    assert [row.where for row in rows_of(spaced)] == ["a.jsonl, line 2", "a.jsonl, line 4"]
    assert rows_of(write("a.json", json.dumps(ROWS)))[1].where == "a.json, row 2"


def test_files_of_a_folder_are_one_data_set_unless_named_by_splits(write: Files) -> None:
    folder = write("plain/2.jsonl", ROWS[1:]).parent
    write("plain/1.jsonl", ROWS[:1])
    write("plain/readme.md", "not data")
    assert rows_of(folder) == ROWS
    folder = write("split/train-0.jsonl", ROWS).parent
    write("split/test.csv", "text,label\nx,a\n")
    assert rows_of(folder) == ROWS
    assert rows_of(folder, "test") == [{"text": "x", "label": "a"}]
    with pytest.raises(DataError, match=r"no file of the split 'dev': test.csv, train-0.jsonl"):
        rows_of(folder, "dev")


def test_folders_of_images_are_labelled_by_their_names(tmp_path: Path, prepare: Prepare) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "photos" / name)
    data = prepare(tmp_path / "photos", None, "image_classification")
    assert data.labels == ("cat", "dog")
    assert [e["label"] for e in data.train] == [0, 0, 1]
    assert Path(data.train[2]["image"]) == (tmp_path / "photos" / "dog" / "1.png").resolve()
    assert data.preview(1)[0].label == "cat"


def test_images_of_a_file_are_found_from_its_folder_or_are_bytes(
    tmp_path: Path, write: Files, prepare: Prepare
) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "1.png")
    path = write("list.csv", "image,label\n1.png,7\n")
    assert prepare(path, None, "image_classification").labels == ("7",)
    with pytest.raises(DataError, match=r"list.csv, line 3: there is no image .*2.png"):
        prepare(write("list.csv", "image,label\n1.png,7\n2.png,7\n"), None, "image_classification")
    raw = (tmp_path / "1.png").read_bytes()
    table = pyarrow.Table.from_pylist([{"image": {"bytes": raw, "path": "1.png"}, "label": 0}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    data = prepare(tmp_path / "a.parquet", None, "image_classification")
    assert data.train[0]["image"] == raw


def test_a_hundred_thousand_rows_are_read_in_seconds(write: Files) -> None:
    path = write("big.jsonl", b"".join(b'{"text": "row %d"}\n' % i for i in range(100_000)))
    started = time.perf_counter()
    assert len(read_file(path)) == 100_000
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2\n', r"a.jsonl, line 2: not JSON .*column 8\): '{\"a\": 2'"),
        ("a.jsonl", b'[{"a": 1}]\n', r"line 1: a list .*expected an object"),
        ("a.jsonl", b'[{"a": 1},\n{"a": 2}]\n', r"looks like one JSON list: name it .json"),
        ("a.json", b'{"a": 1}\n{"a": 2}\n', r"line 2: not JSON .*name it .jsonl"),
        ("a.json", b'{"rows": []}', r'expected a list of objects, or {"data": \[...\]}'),
        ("a.json", b'[{"a": 1}, 3]', r"a.json, row 2: a int \('3'\)"),
        ("a.jsonl", b"", r"a.jsonl is empty"),
        ("a.jsonl", b"\n\n", r"a.jsonl holds no rows"),
        ("a.csv", b"a,b\n", r"a.csv holds no rows"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", r"line 3: 3 fields, but the header has 2 \(a, b\)"),
        ("a.csv", b"a,a\n1,2\n", r"line 1: no header of distinct columns; twice: a"),
        ("a.csv", b'a,b\n"x" y,2\n', r"line 2: not CSV"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', r"line 2: not UTF-8; byte 17 .* 0xe9.*1252"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), r"line 1: not UTF-8; byte 1 .*iconv -f UTF-16"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"a": 1}\n', mtime=0)[:-9],
            r"a.jsonl.gz is no whole gzip file",
        ),
        ("a.jsonl.gz", b'{"a": 1}\n', r"a.jsonl.gz is no whole gzip file"),
        ("a.parquet", b"PAR1 nothing", r"a.parquet is no whole parquet file"),
        ("a.txt", b"words", r"unknown kind of file. Data files end in .json"),
    ],
)
def test_broken_files_say_where_and_why(
    write: Files, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(write(name, content))


def test_a_missing_file_names_its_neighbours_and_the_embedded_sets(write: Files) -> None:
    path = write("reviews.jsonl", ROWS)
    with pytest.raises(DataError, match=r"It has reviews.jsonl.*movie_reviews"):
        rows_of(path.with_name("review.jsonl"))
    with pytest.raises(DataError, match="there is no folder"):
        rows_of(path.parent / "nowhere" / "a.csv")
    (path.parent / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data: nothing"):
        rows_of(path.parent / "empty")


def test_offline_hub_names_end_in_one_message_with_the_ways_out() -> None:
    code = """
import os
os.environ["HF_HUB_OFFLINE"] = "1"
from pathlib import Path
from typing import Any
from peftcli.data.sources import locate
from peftcli.settings import Dataset
try:
    locate("movie_review", Dataset(), "train", Path("/nonexistent")).fingerprint()
except ValueError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("DataError dataset.path='movie_review' is no file, no folder")
    for part in ("Did you mean movie_reviews", "Without a network", ".jsonl", "save_to_disk"):
        assert part in done.stdout


def test_a_hub_commit_needs_no_network_to_be_known(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = locate("owner/name", Dataset(revision=commit), "test", tmp_path)
    assert isinstance(place, Hub)
    assert place.fingerprint()["commit"] == commit
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "owner--name@main").write_text(commit)
    assert locate("owner/name", Dataset(), "test", tmp_path).fingerprint()["commit"] == commit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": None}, "Give dataset.path or dataset.mixture, not neither. Embedded sets are"),
        ({"name": "main"}, r"dataset.name='main': .* is no data set of the hub"),
        ({"revision": "main"}, r"dataset.revision='main': .* is no data set of the hub"),
        ({"eval_split": "test"}, r"dataset.eval_split='test' names the training examples"),
    ],
)
def test_keys_that_would_say_nothing_are_refused(
    write: Files,
    prepare: Prepare,
    base: PreTrainedTokenizerBase,
    options: dict[str, str | None],
    message: str,
) -> None:
    path = write("a.jsonl", [{"text": "one"}])
    with pytest.raises(ConfigError, match=message):
        prepare(**{"path": path, "tokenizer": base, **options})
