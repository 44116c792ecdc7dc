"""Published tables: their files, the parameters that they print, and runs of their cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from peftcli.errors import ConfigError
from peftcli.settings import Sweep
from peftcli.sweep import of_table
from peftcli.sweep.line import Composer
from peftcli.tables import paper, printed
from peftcli.tables.paper import Asked, Paper, Row
from peftcli.tables.runs import RunRecord
from tests.conftest import Cli

TABLES = sorted(paper.names())
GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")


@pytest.fixture(scope="module")
def composer() -> Composer:
    """One search path for all tables."""
    return Composer()


@pytest.fixture(scope="module")
def known() -> dict[str, printed.Count]:
    """What was counted before: papers share rows."""
    return {}


def counted(
    composer: Composer, known: dict[str, printed.Count], table: Paper, row: Row
) -> printed.Count:
    """A row's count; the same sizes with the same method are counted once."""
    heads = table.head if row.head is None else row.head
    words = [w for w in table.words(row) or () if w.startswith(("model", "method"))]
    words = [w for w in words if not w.startswith(("model.name_or_path", "method.alpha"))]
    key = repr((sorted(words), heads, row.stored, table.share_of))
    if key not in known:
        known[key] = printed.count(printed.run_of(composer, table, row), table, row)
    return known[key]


# -- What papers print -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", TABLES)
def test_parameters_are_those_printed_or_the_difference_is_explained(
    name: str, composer: Composer, known: dict[str, printed.Count]
) -> None:
    table = paper.read(name)
    for row in table.rows:
        if row.parameters and row.overrides and not row.reason:
            count = counted(composer, known, table, row)
            here = printed.as_printed(count.parameters, count.whole, row.parameters)
            assert (here != row.parameters) == bool(row.explains), f"{row.name}: here {here}"


def test_twelve_columns_of_parameters_are_printed_exactly() -> None:
    counted = {name: [r for r in paper.read(name).rows if r.parameters] for name in TABLES}
    exact = {
        name
        for name, rows in counted.items()
        if rows and not any(r.explains or r.reason or r.overrides is None for r in rows)
    }
    assert len(exact) >= 12, exact


@pytest.mark.parametrize("name", TABLES)
def test_a_file_begins_with_its_command(name: str) -> None:
    assert paper.names()[name].read_text().startswith(f"# peft-train table +table={name}\n")


def test_the_data_of_each_column_go_with_a_row(composer: Composer) -> None:
    seen = set()
    for table in map(paper.read, TABLES):
        for column in table.columns:
            cells = [w for row in table.rows if (w := table.words(row, column))]
            if cells and column.overrides not in seen:
                seen.add(column.overrides)
                composer.member(cells[0])
    assert len(seen) > len(GLUE)


@pytest.mark.parametrize("name", TABLES)
def test_a_printed_mean_is_that_of_the_printed_scores(name: str) -> None:
    table = paper.read(name)
    for row in table.rows:
        for column in table.columns:
            mean = paper.mean(column, row.scores)
            if mean is not None and column.name in row.scores:
                assert row.scores[column.name] == pytest.approx(mean, abs=0.0101), row.name


@pytest.mark.parametrize(
    ("count", "base", "like", "shown"),
    [
        (294_912, 1, "0.3M", "0.3M"),
        (393_216, 1, "0.35M", "0.39M"),
        (24_000, 1, "24K", "24K"),
        (12_582_912, 1, "12,502,912", "12,582,912"),
        (161_728, 222_903_552, "0.073%", "0.073%"),
        (207, 1, "207", "207"),
    ],
)
def test_counts_are_shown_as_the_paper_shows_them(
    count: int, base: int, like: str, shown: str
) -> None:
    assert paper.as_printed(count, base, like) == shown


# -- Files -----------------------------------------------------------------------------------------
def file(tmp_path: Path, **changes: Any) -> Path:
    """A user's folder with one table."""
    of = {"title": "t", "authors": "a", "year": 2020, "arxiv": "1", "table": "1"}
    row = {"name": "LoRA", "overrides": ["method=lora"], "scores": {"sst2": 90.0}}
    values = {"title": "mine", "source": of, "certainty": "read", "suite": "glue", "rows": [row]}
    (tmp_path / "table").mkdir(exist_ok=True)
    (tmp_path / "table" / "mine.yaml").write_text(yaml.safe_dump(values | changes))
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ttle": "x"}, "'ttle'. Did you mean title"),
        ({"rows": [{"name": "x", "overides": []}]}, "Did you mean rows[0].overrides"),
        ({"certainty": "sure"}, "certainty=sure"),
        ({"suite": "glu"}, "suite=glu"),
        ({"rows": [{"name": "x", "overrides": None}]}, "needs a reason"),
        ({"rows": [{"name": "x", "overrides": [], "parameters": "many"}]}, "parameters=many"),
        ({"rows": [{"name": "x", "overrides": [], "scores": {"sst": 1.0}}]}, "no column 'sst'"),
        ({"rows": [{"name": "x", "overrides": []}] * 2}, "two rows are named 'x'"),
        ({"rows": [{"name": "x, y", "overrides": []}]}, "no commas"),
    ],
)
def test_what_no_table_has_is_refused_with_the_file(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = file(tmp_path, **changes)
    with pytest.raises(ConfigError) as error:
        paper.read("mine", [folder])
    assert said in str(error.value)
    assert "mine.yaml" in str(error.value)


def test_a_name_that_no_table_has_suggests_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean lora_glue"):
        paper.read("lora_gleu")


# -- Cells -----------------------------------------------------------------------------------------
def test_cells_are_rows_times_columns_times_seeds(tmp_path: Path) -> None:
    table = paper.read("mine", [file(tmp_path, seeds=[0, 1], overrides=["model=minilm"])])
    cells = paper.cells(table)
    assert len(cells) == len(GLUE) * 2
    assert cells[1] == ("model=minilm", "method=lora", "dataset=glue_cola", "seed=1")
    assert len(paper.cells(table, ["seed=7"])) == len(GLUE)
    one = Asked("mine", columns=("sst2",)).of(table)
    assert paper.cells(one, ["model=local", "seed=7"]) == [
        ("method=lora", "dataset=glue_sst2", "model=local", "seed=7")
    ]
    with pytest.raises(ConfigError, match=r"no 'sst'\. Did you mean sst2"):
        Asked("mine", columns=("sst",)).of(table)


def test_a_table_that_cannot_be_run_says_why() -> None:
    with pytest.raises(ConfigError, match="BLEU of generated text"):
        paper.cells(paper.read("lora_e2e"))


def test_a_table_is_not_searched() -> None:
    with pytest.raises(ConfigError, match=r"sweep\.tuning_seeds: .* has its cells"):
        of_table._refuse_search(Sweep(tuning_seeds=(0,)))


def test_other_options_of_the_method_make_another_run() -> None:
    cell = ("model=roberta_base", "method=lora", "dataset=glue_cola")
    assert paper.is_run_of(cell, (*cell, "seed=3", "model.name_or_path=/here"))
    assert not paper.is_run_of(cell, (*cell, "method.r=16"))
    assert not paper.is_run_of(cell, cell[:2])


def record(folder: Path, *words: str, seed: int = 0, **metrics: float) -> RunRecord:
    """A run that is done."""
    result = {"train_info": {"metrics": {"after": metrics}}}
    return RunRecord(folder, {"seed": seed}, result=result, overrides=words)


def test_scores_are_means_over_seeds_and_collapsed_runs_are_named(tmp_path: Path) -> None:
    table = Asked("", ("LoRA",)).of(paper.read("mine", [file(tmp_path)]))
    row = table.rows[0]
    runs = [
        record(tmp_path, "method=lora", f"dataset=glue_{task}", seed=seed, accuracy=score)
        for task, score in (("sst2", 0.9), ("mnli", 0.3))
        for seed in (0, 1)
    ]
    runs.append(record(tmp_path, "method=dora", "dataset=glue_sst2", accuracy=0.1))
    runs[1].result["train_info"]["metrics"]["after"]["accuracy"] = 0.92
    found = printed.measured(table, row, runs)
    assert found.keys() == {"sst2", "mnli"}  # no mean where a column lacks
    assert found["sst2"].mean == pytest.approx(91.0)
    assert found["sst2"].deviation == pytest.approx(2**0.5)
    assert any(
        "mnli 30 (measured) is of a collapsed run" in n
        for n in printed._notes(table, row, None, found)
    )


def test_a_mean_is_taken_over_the_seeds_that_all_columns_have(tmp_path: Path) -> None:
    table = paper.read("mine", [file(tmp_path)])
    names = {"cola": "mcc", "stsb": "pearson"}
    runs = [
        record(
            tmp_path, "method=lora", f"dataset=glue_{t}", seed=s, **{names.get(t, "accuracy"): 0.5}
        )
        for t in GLUE
        for s in ((0, 1) if t != "rte" else (1,))
    ]
    assert printed.measured(table, table.rows[0], runs)["mean"].scores == (50.0,)


# -- The command line ------------------------------------------------------------------------------
def test_the_verb_shows_printed_beside_here(cli: Cli) -> None:
    said = cli("table", "+table=adapter_glue", "--format", "json").stdout
    row = json.loads(said)["rows"][1]
    assert (row["parameters printed"], row["parameters here"]) == ("2.1%", 6_444_032)
    assert row["mean printed"] == 79.6
    assert row["mean here"] is None
    shown = cli("table", "+table=adapter_glue", "table.rows=adapters of size 64").stdout
    assert "2.1% | 6,444,032" in shown
    assert "peft-train -m +table=adapter_glue" in shown


def test_the_verb_lists_tables_and_suggests(cli: Cli) -> None:
    assert "lora_glue" in cli("table", "+table").stdout
    assert "Did you mean lora_glue" in cli("table", "+table=lora_gleu", code=2).stderr
    assert "peft-train -m +table=lora_glue" in cli("+table=lora_glue", code=2).stderr


def test_cells_run_as_a_sweep_and_fill_the_table(cli: Cli, models: Path, tmp_path: Path) -> None:
    stand_ins = [
        "model=local",
        f"model.name_or_path={models / 'bert'}",
        "dataset=movie_reviews_classification",
        "dataset.max_length=512",
        "dataset.train_samples=8",
        "dataset.eval_samples=8",
        "trainer.max_steps=1",
        "trainer.eval_on_start=false",
    ]
    asked = ["+table=lora_glue", "table.rows=[LoRA (base)]", "table.columns=[sst2]"]
    cli("-m", *asked, *stand_ins, "seed=1", "sweep_dir=sweep", "sweep.jobs=1")
    files = [json.loads(f.read_text()) for f in tmp_path.glob("sweep/members/*/member.json")]
    assert [f["overrides"] for f in files] == [["method=lora", "method.r=8", "method.alpha=8"]]
    said = cli("table", *asked, "sweep", *stand_ins, "--format", "json").stdout
    assert json.loads(said)["rows"][0]["sst2 here"]["seeds"] == 1
