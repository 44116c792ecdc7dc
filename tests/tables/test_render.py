"""One table in every format."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from peftcli.errors import ConfigError
from peftcli.tables.render import (
    PLUS_MINUS,
    RENDERERS,
    Cell,
    Column,
    Table,
    render,
    selected,
    write,
)
from peftcli.tables.verbs import FORMATS

TABLE = Table(
    title="accuracy by method",
    header=(Column("method", "method"), Column("accuracy, %", "accuracy"), Column("size", "bytes")),
    rows=(
        (
            Cell("a|b_<i>", "a|b_<i>"),
            Cell(f"90.0 {PLUS_MINUS} 1.0", 0.9, 0.01, (0.89, 0.91), 3, bold=True),
            Cell("1.0 KiB", 1024),
        ),
        (Cell("c", "c"), Cell(), Cell()),
    ),
    notes=("a note",),
    missing=("peft-train x seed=1",),
    failed=("y: out of memory",),
)


def test_markdown_escapes_what_would_end_a_cell() -> None:
    lines = render(TABLE, "markdown").splitlines()
    assert lines[2:6] == [
        "| method | accuracy, % | size |",
        "| --- | ---: | ---: |",
        f"| a\\|b_&lt;i> | **90.0 {PLUS_MINUS} 1.0** | 1.0 KiB |",
        "| c | - | - |",
    ]
    assert "- `peft-train x seed=1`" in lines
    assert "- y: out of memory" in lines


def test_latex_escapes_its_special_characters() -> None:
    text = render(TABLE, "latex")
    assert r"a|b\_\textless{}i\textgreater{} & \textbf{90.0 $\pm$ 1.0} & 1.0 KiB \\" in text
    assert r"method & accuracy, \% & size \\" in text
    assert "% notes: a note" in text


def test_csv_has_full_precision_and_dashes() -> None:
    rows = list(csv.reader(io.StringIO(render(TABLE, "csv"))))
    assert rows == [
        ["method", "accuracy", "accuracy std", "accuracy seeds", "bytes"],
        ["a|b_<i>", "0.9", "0.01", "3", "1024"],
        ["c", "-", "-", "-", "-"],
    ]


def test_json_has_numbers_and_nulls() -> None:
    found = json.loads(render(TABLE, "json"))
    assert found["rows"][0]["accuracy"] == {
        "mean": 0.9,
        "std": 0.01,
        "seeds": 3,
        "interval_95": [0.89, 0.91],
        "text": f"90.0 {PLUS_MINUS} 1.0",
    }
    assert found["rows"][1] == {"method": "c", "accuracy": None, "bytes": None}
    assert found["missing"] == ["peft-train x seed=1"]


def test_the_screen_shows_markup_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("[bold]t", (Column("[red]x", "x"),), ((Cell("[/nope]", "v"),),), ("[b]note",))
    write(table, None, None)
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("[bold]t", "[red]x", "[/nope]", "[b]note"))


def test_columns_are_chosen_by_their_keys() -> None:
    found = selected(TABLE, ("bytes", "method"))
    assert [column.key for column in found.header] == ["bytes", "method"]
    assert found.rows[0][0].value == 1024
    assert selected(TABLE, ()) == TABLE
    with pytest.raises(ConfigError, match=r"--show byte: no such column. Did you mean bytes"):
        selected(TABLE, ("byte",))


def test_every_format_of_the_command_line_is_one() -> None:
    assert FORMATS == ("rich", *RENDERERS)


def test_the_files_name_says_the_format(tmp_path: Path) -> None:
    write(TABLE, None, tmp_path / "new" / "t.csv")
    assert (tmp_path / "new" / "t.csv").read_text() == render(TABLE, "csv")
    write(TABLE, "latex", tmp_path / "t.txt")
    assert (tmp_path / "t.txt").read_text() == render(TABLE, "latex")
    with pytest.raises(ConfigError, match=r"its ending is none of .md, .csv, .tex, .json"):
        write(TABLE, None, tmp_path / "t.txt")
