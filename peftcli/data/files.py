"""Data files to rows that know where they stand: .json, .jsonl, .csv (also .gz) and .parquet."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftcli.errors import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".json.gz", ".jsonl.gz", ".csv.gz", ".parquet")
BOM = b"\xef\xbb\xbf"
CSV_FIELD_LIMIT = 2**31 - 1  # bytes; the module's own limit of 131,072 refuses long documents


class Row(dict[str, Any]):
    """A row with its file's name and its line there (its number, where the file has no lines)."""

    __slots__ = ("file", "line")

    def __init__(self, values: dict[str, Any], file: str, line: int) -> None:
        """The columns, the file's name, and where in it, from 1."""
        super().__init__(values)
        self.file = file
        self.line = line

    @property
    def where(self) -> str:
        """'reviews.jsonl, line 3', for messages."""
        by_line = ".jsonl" in self.file or ".csv" in self.file
        return f"{self.file}, {'line' if by_line else 'row'} {self.line}"

    @property
    def id(self) -> str:
        """'reviews.jsonl:3', for batches."""
        return f"{self.file}:{self.line}"


def is_data_file(path: Path) -> bool:
    """Whether the name ends like a file that we read."""
    return path.name.lower().endswith(SUFFIXES)


def read_file(path: Path) -> list[Row]:
    """All rows of one file."""
    name = path.name.lower()
    if not is_data_file(path):
        raise DataError(f"{path}: unknown kind of file. Data files end in {', '.join(SUFFIXES)}.")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty.")
    if name.endswith(".parquet"):
        rows = _read_parquet(path)
    else:
        reader = {"jsonl": _read_jsonl, "json": _read_json, "csv": _read_csv}
        rows = list(reader[name.removesuffix(".gz").rsplit(".", 1)[1]](path))
    if not rows:
        raise DataError(f"{path} holds no rows.")
    return rows


# -- text ------------------------------------------------------------------------------------------
def _lines(path: Path) -> Iterator[str]:
    """The lines of a file, plain or gzip, decoded one by one so that a wrong byte has a line."""
    opened = gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")
    before = 0
    with opened as raw:
        try:
            for number, line in enumerate(raw, 1):
                text = line.removeprefix(BOM) if number == 1 else line
                yield _decoded(text, path, number, before + len(line) - len(text))
                before += len(line)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path} is no whole gzip file: {error}.") from error


def _decoded(line: bytes, path: Path, number: int, before: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        guess = "UTF-16" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else "WINDOWS-1252"
        raise DataError(
            f"{path}, line {number}: not UTF-8; byte {before + error.start + 1} of the file is "
            f"0x{line[error.start]:02x}. If the file is {guess}, convert it: iconv -f {guess} -t "
            f"UTF-8 {path.name} > utf8_{path.name}"
        ) from error


def _row(value: object, path: Path, number: int) -> Row:
    row = Row({}, path.name, number)
    if not isinstance(value, dict):
        raise DataError(
            f"{row.where}: a {type(value).__name__} ({_begin(value)}), expected an object with "
            "columns."
        )
    row.update(value)
    return row


def _begin(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return repr(text[:60] + ("..." if len(text) > 60 else ""))


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.rstrip())
        except json.JSONDecodeError as error:
            hint = (
                " The file looks like one JSON list: name it .json."
                if number == 1 and line[0] == "["
                else ""
            )
            raise DataError(
                f"{path}, line {number}: not JSON ({error.msg}, column {error.colno}): "
                f"{_begin(line.rstrip())}.{hint}"
            ) from error
        yield _row(value, path, number)


def _read_json(path: Path) -> Iterator[Row]:
    lines = list(_lines(path))
    try:
        value = json.loads("".join(lines))
    except json.JSONDecodeError as error:
        hint = (
            " The file looks like one object a line: name it .jsonl."
            if error.msg == "Extra data"
            else ""
        )
        line = lines[error.lineno - 1].rstrip() if error.lineno <= len(lines) else ""
        raise DataError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}): "
            f"{_begin(line)}.{hint}"
        ) from error
    items = value.get("data") if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise DataError(
            f'{path}: expected a list of objects, or {{"data": [...]}}; it begins {_begin(value)}.'
        )
    for number, item in enumerate(items, 1):
        yield _row(item, path, number)


def _read_csv(path: Path) -> Iterator[Row]:
    """Values stay text; a quoted field may span lines, and the row's line is its first."""
    csv.field_size_limit(CSV_FIELD_LIMIT)
    reader = csv.reader(_lines(path), strict=True)
    try:
        header = next(reader, [])
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice or not any(header):
            raise DataError(
                f"{path}, line 1: no header of distinct columns; twice: "
                f"{', '.join(twice) or 'none'}."
            )
        line = reader.line_num + 1
        for fields in reader:
            if len(fields) not in (0, len(header)):
                raise DataError(
                    f"{path}, line {line}: {len(fields)} fields, but the header has {len(header)} "
                    f"({', '.join(header)}). Quote fields that hold commas."
                )
            if fields:
                yield Row(dict(zip(header, fields, strict=True)), path.name, line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not CSV: {error}.") from error


# -- tables ----------------------------------------------------------------------------------------
def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        raise DataError(f"{path} is no whole parquet file: {error}.") from error
    return table_rows(table, path.name)


def table_rows(table: Any, file: str) -> list[Row]:
    """Rows of an arrow table; label numbers become the names that `datasets` stored for them."""
    names = _class_names(table.schema.metadata or {})
    rows = [Row(values, file, number) for number, values in enumerate(table.to_pylist(), 1)]
    for column, known in names.items():
        for row in rows:
            label = row.get(column)
            if isinstance(label, int):
                row[column] = known[label] if label >= 0 else None  # -1 is "no label" on the hub
    return rows


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    info = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {})
    features = info.get("features", {})
    return {
        name: f["names"]
        for name, f in features.items()
        if isinstance(f, dict) and f.get("_type") == "ClassLabel"
    }
