"""The table of a paper from run folders: cells, tuned values, protocols, what is missing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from peftcli.errors import ConfigError, DataError
from peftcli.tables.render import Cell, Table
from peftcli.tables.runs import read_runs
from peftcli.tables.table import Asked, plan_of, table_of
from tests.tables.conftest import WriteRun

if TYPE_CHECKING:
    from tests.conftest import Cli

LR = "optimizer.lr"


def table(*paths: Path, **asked: object) -> Table:
    runs, wanted = read_runs(paths), Asked(**asked)
    return table_of(runs, plan_of(runs, wanted), wanted.paired)


def cell(found: Table, row: str, column: str) -> Cell:
    place = [c.key for c in found.header].index(column)
    return next(cells[place] for cells in found.rows if cells[0].text == row)


def methods(write_run: WriteRun, tmp_path: Path) -> Path:
    for seed, lora, ia3 in ((0, 0.90, 0.70), (1, 0.92, 0.72), (2, 0.94, 0.71)):
        write_run(f"runs/lora{seed}", lora, method="lora", seed=seed)
        write_run(f"runs/ia3{seed}", ia3, method="ia3", seed=seed)
    return tmp_path / "runs"


# -- Numbers ---------------------------------------------------------------------------------------
def test_mean_and_deviation_over_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    found = table(methods(write_run, tmp_path))
    lora = cell(found, "lora", "accuracy")
    assert lora.text == "92.0 \u00b1 2.0"
    assert lora.value == pytest.approx(0.92)
    assert lora.deviation == pytest.approx(0.02)
    assert lora.seeds == 3
    assert cell(found, "lora", "seeds").text == "3"
    assert cell(found, "lora", "num_trainable_params").value == 1000
    assert cell(found, "ia3", "num_trainable_params").value == 2000
    assert cell(found, "lora", "adapter_bytes").text == "1.0 MiB"
    assert cell(found, "lora", "optimizer_bytes").value == 2**21
    assert cell(found, "lora", "peak_memory_bytes").text == "1.00 GiB"
    assert cell(found, "lora", "train_seconds").value == 12.5
    assert [row[0].text for row in found.rows] == ["lora", "ia3"]  # the best first
    assert found.missing == ()


def test_the_best_is_bold_only_where_intervals_do_not_overlap(
    write_run: WriteRun, tmp_path: Path
) -> None:
    found = table(methods(write_run, tmp_path))
    assert cell(found, "lora", "accuracy").bold
    assert not cell(found, "ia3", "accuracy").bold
    for seed, value in enumerate((0.91, 0.93, 0.9)):
        write_run(f"runs/oft{seed}", value, method="oft", seed=seed)
    found = table(tmp_path / "runs")
    assert not any(cell.bold for row in found.rows for cell in row)


def test_one_seed_has_no_deviation_and_is_not_bold(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", 0.9, method="lora", seed=0)
    write_run("runs/b", 0.1, method="ia3", seed=0)
    lora = cell(table(tmp_path / "runs"), "lora", "accuracy")
    assert (lora.text, lora.deviation, lora.interval, lora.bold) == ("90.0", None, None, False)


def test_rows_and_columns_by_any_key(write_run: WriteRun, tmp_path: Path) -> None:
    for r in (4, 16):
        for alpha in (8.0, 16.0):
            write_run(
                f"runs/{r}-{alpha}",
                r / 100 + alpha / 1000,
                **{"method.r": r, "method.alpha": alpha},
            )
    found = table(tmp_path / "runs", rows=("r",), columns=("method.alpha",))
    assert [c.key for c in found.header][:4] == [
        "method.r",
        "accuracy: 8.0",
        "accuracy: 16.0",
        "accuracy: all",
    ]
    assert [row[0].value for row in found.rows] == [4, 16]  # by number, not the best first
    assert cell(found, "16", "accuracy: 8.0").value == pytest.approx(0.168)
    assert cell(found, "16", "accuracy: all").value == pytest.approx(0.172)


def test_interquartile_means_on_request(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, value in enumerate((0.1, 0.2, 0.3, 0.4, 1.0)):
        write_run(f"runs/{seed}", value, seed=seed)
    found = cell(table(tmp_path / "runs", how="iqm"), "lora", "accuracy")
    assert found.value == pytest.approx(0.3)
    assert found.text.startswith("30.0 [")


def test_paired_differences_on_equal_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    runs = methods(write_run, tmp_path)
    write_run("runs/lora9", 0.1, method="lora", seed=9)  # ia3 has no such seed
    found = table(runs, paired="lora")
    difference = cell(found, "ia3", "minus lora")
    assert difference.value == pytest.approx(-0.21)
    assert difference.text.startswith("-21.0 [")
    assert cell(found, "ia3", "p").value == pytest.approx(0.25)
    assert cell(found, "ia3", "pairs").value == 3
    assert cell(found, "lora", "p").text == "-"
    with pytest.raises(ConfigError, match=r"--paired lor: no such row. Did you mean lora"):
        table(runs, paired="lor")


def test_unknown_keys_and_metrics_name_near_ones(write_run: WriteRun, tmp_path: Path) -> None:
    runs = methods(write_run, tmp_path)
    with pytest.raises(ConfigError, match=r"no key 'methd'.* Did you mean method"):
        table(runs, rows=("methd",))
    with pytest.raises(
        ConfigError, match=r"--metric acuracy: no run has it. Did you mean accuracy"
    ):
        table(runs, metric="acuracy")
    with pytest.raises(ConfigError, match=r"run: no such folder. Did you mean runs"):
        table(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no run"):
        table(tmp_path / "empty")


def test_a_run_counts_once(write_run: WriteRun, tmp_path: Path) -> None:
    runs = methods(write_run, tmp_path)
    write_run("runs/again", 0.90, method="lora", seed=0)
    found = table(runs, runs / "lora0")
    assert cell(found, "lora", "accuracy").seeds == 3
    assert any("left out" in note and "runs/" in note for note in found.notes)


# -- Tuned keys ------------------------------------------------------------------------------------
def test_the_tuned_key_is_found_and_chosen_on_the_same_seeds(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for lr, values in ((1e-3, (0.8, 0.9)), (1e-2, (0.7, 0.8)), (1e-1, (0.99,))):
        for seed, value in enumerate(values):
            write_run(f"runs/{lr}-{seed}", value, seed=seed, **{LR: lr})
    found = table(tmp_path / "runs")
    assert cell(found, "lora", LR).value == 1e-3  # 1e-1 has one seed of two: it does not compete
    assert cell(found, "lora", "tried").value == 3
    assert cell(found, "lora", "accuracy").value == pytest.approx(0.85)
    assert any("on the same seeds that are reported (0, 1)" in note for note in found.notes)


def test_tuning_seeds_choose_and_are_not_reported(write_run: WriteRun, tmp_path: Path) -> None:
    for lr, value in ((1e-3, 0.8), (1e-2, 0.95)):
        keys = {LR: lr, "dataset.seed": 100}
        other = {"dataset": {"sha256": "9" * 64}}
        write_run(f"runs/tuning{lr}", value, seed=100, meta=other, **keys)
    for seed, value in ((0, 0.85), (1, 0.87)):
        write_run(f"runs/test{seed}", value, seed=seed, **{LR: 1e-2})
    with pytest.raises(ConfigError, match=r"dataset.seed: 0 .2 runs., 100 .2 runs."):
        table(tmp_path / "runs")
    found = table(tmp_path / "runs", tuning_seeds=(100,))
    assert cell(found, "lora", LR).value == 1e-2
    assert cell(found, "lora", "accuracy").value == pytest.approx(0.86)
    assert cell(found, "lora", "accuracy").seeds == 2
    assert cell(found, "lora", "tuning_gap").text == "+9.0"
    assert any("on 1 tuning seed only (100), which is not reported" in n for n in found.notes)
    assert any("tuning runs have dataset.seed=100, reported ones 0" in n for n in found.notes)
    with pytest.raises(ConfigError, match="both tuning and test seeds"):
        table(tmp_path / "runs", tuning_seeds=(100, 0), test_seeds=(0,))


def test_among_equals_the_value_that_a_search_has_reported_is_the_best(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for lr in (1e-3, 1e-2):
        write_run(f"runs/tuning{lr}", 0.8, seed=100, **{LR: lr})
    write_run("runs/test", 0.7, seed=0, **{LR: 1e-2})
    found = table(tmp_path / "runs", tuning_seeds=(100,))
    assert cell(found, "lora", LR).value == 1e-2
    assert cell(found, "lora", "accuracy").value == pytest.approx(0.7)


def test_a_loss_is_better_when_lower(write_run: WriteRun, tmp_path: Path) -> None:
    for lr, value in ((1e-3, 0.8), (1e-2, 0.95)):
        write_run(f"runs/{lr}", value, **{LR: lr})
    found = table(tmp_path / "runs", metric="loss")
    assert cell(found, "lora", LR).value == 1e-2
    assert cell(found, "lora", "loss").text == "0.0500"


def test_options_that_come_with_the_method_are_not_tuned_keys(
    write_run: WriteRun, tmp_path: Path
) -> None:
    found = table(methods(write_run, tmp_path), rows=("model",))
    assert [c.key for c in found.header][:4] == ["model", "accuracy", "method", "tried"]
    assert found.rows[0][2].text == "lora"


# -- Protocol --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("keys", "meta", "named"),
    [
        ({"dataset.prompt": "Say: {text}"}, {}, r"dataset.prompt: null \(1 run\), Say: \{text\} "),
        ({"dataset.train_on": "all"}, {}, "dataset.train_on"),
        ({"dataset.eval_samples": 7}, {}, "dataset.eval_samples"),
        ({"trainer.num_train_epochs": 9.0}, {}, "trainer.num_train_epochs"),
        ({}, {"dataset": {"sha256": "8" * 64}}, "dataset.sha256: 444444444444... .1 run., 88888"),
        ({}, {"model": {"sha256": "8" * 64}}, "model.sha256"),
        ({}, {"dtype": "bfloat16"}, "dtype: float32 .1 run., bfloat16"),
        ({}, {"package_info": {"torch": "2.14.0"}}, "versions.torch"),
    ],
)
def test_runs_of_different_protocols_are_refused_unless_shown(
    write_run: WriteRun,
    tmp_path: Path,
    keys: dict[str, object],
    meta: dict[str, object],
    named: str,
) -> None:
    write_run("runs/a", 0.9, method="lora")
    write_run("runs/b", 0.8, method="ia3", meta=meta, **keys)
    with pytest.raises(ConfigError, match=named):
        table(tmp_path / "runs")
    found = table(tmp_path / "runs", show_differences=True)
    assert found.header[1].key == named.partition(":")[0]
    assert len(found.rows) == 2


def test_learning_rates_methods_and_bookkeeping_are_no_protocol(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run(
        "runs/a", 0.9, method="lora", seed=0, name="x", **{LR: 1e-3, "trainer.num_threads": 1}
    )
    write_run("runs/b", 0.8, method="ia3", seed=0, name="y", **{LR: 1e-2, "trainer.num_threads": 2})
    found = table(tmp_path / "runs")
    assert any("rows differ in optimizer.lr, which was not tuned" in note for note in found.notes)


def test_a_shown_key_explains_what_differs_with_it(write_run: WriteRun, tmp_path: Path) -> None:
    for name, text in (("movie_reviews", "4"), ("tweets", "9")):
        meta = {"dataset": {"sha256": text * 64}}
        write_run(f"runs/{name}", 0.9, meta=meta, **{"dataset.path": name})
    found = table(tmp_path / "runs", columns=("dataset",))
    assert [c.title for c in found.header][1:4] == ["movie_reviews, %", "tweets, %", "all, %"]


def test_a_key_that_came_later_has_its_default_in_older_runs(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run("runs/new", 0.9, seed=0)
    old = write_run("runs/old", 0.8, seed=1)
    result = json.loads((old / "result.json").read_text())
    del result["run_info"]["train_config"]["optimizer"]["head_lr"]
    del result["run_info"]["train_config"]["dataset"]["train_on"]
    del result["run_info"]["train_config"]["method"]["init"]
    (old / "result.json").write_text(json.dumps(result))
    assert cell(table(tmp_path / "runs"), "lora", "accuracy").seeds == 2
    write_run("runs/head", 0.95, seed=0, **{"optimizer.head_lr": 0.03})
    assert cell(table(tmp_path / "runs"), "lora", "tried").value == 2


# -- What is missing -------------------------------------------------------------------------------
def test_missing_cells_are_dashes_with_the_command_that_fills_them(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("movie_reviews", "tweets"):
        meta = {"dataset": {"sha256": name[0] * 64}}
        write_run(f"runs/lora-{name}", 0.9, meta=meta, **{"dataset.path": name})
    meta = {"dataset": {"sha256": "m" * 64}}
    write_run(
        "runs/ia3", 0.7, method="ia3", meta=meta, **{"dataset.path": "movie_reviews", LR: 0.02}
    )
    found = table(tmp_path / "runs", columns=("dataset",))
    assert cell(found, "ia3", "accuracy: tweets") == Cell()
    assert cell(found, "ia3", "accuracy: all") == Cell()
    (command,) = found.missing
    words = shlex.split(command)
    assert words[:3] == ["peft-train", "runs/lora-tweets", "method=ia3"]
    assert f"{LR}=0.02" in words
    assert "seed=0" in words


def test_a_missing_seed_is_run_from_its_neighbour(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = methods(write_run, tmp_path)
    write_run("runs/oft0", 0.5, method="oft", seed=0)
    write_run("runs/oft1", method="oft", seed=1)  # begun, not done
    found = table(runs)
    assert cell(found, "oft", "accuracy").seeds == 1
    assert found.missing == (
        "peft-train runs/oft1",
        "peft-train runs/oft0 seed=2 run_dir=runs/seed2",
    )


def test_seeds_as_columns_are_not_asked_for_twice(write_run: WriteRun, tmp_path: Path) -> None:
    runs = methods(write_run, tmp_path)
    assert table(runs, columns=("seed",)).missing == ()
    write_run("runs/oft0", 0.5, method="oft", seed=0)
    missing = table(runs, columns=("seed",)).missing
    assert [[w for w in c.split() if w.startswith("seed=")] for c in missing] == [
        ["seed=1"],
        ["seed=2"],
    ]


def test_the_command_fills_the_cell(tiny_run: list[str], cli: Cli) -> None:
    words = [word for word in tiny_run if not word.startswith(("method.r", "run_dir"))]
    words += ["trainer.max_steps=1", "dataset.eval_samples=2"]
    for method, seed in (("lora", 0), ("lora", 1), ("ia3", 0)):
        cli(*words, f"method={method}", f"seed={seed}", f"run_dir=runs/{method}{seed}")
    (command,) = json.loads(cli("table", "runs", "--format", "json").stdout)["missing"]
    cli(*shlex.split(command)[1:])
    rows = json.loads(cli("table", "runs", "--format", "json").stdout)["rows"]
    assert [row["loss"]["seeds"] for row in rows] == [2, 2]


def test_a_sweeps_members_are_filled_by_its_line_and_failures_are_named(
    write_sweep: Callable[..., Path],
) -> None:
    line = ["+recipe=lora_minilm", "method=lora,ia3", "seed=0,1"]
    members = [
        (["method=lora", "seed=0"], "done", 0.9),
        (["method=lora", "seed=1"], "waiting", None),
        (["method=ia3", "seed=0"], "failed", None),
        (["method=ia3", "seed=1"], "stopped", None),
        (["method=ia3", "seed=2"], "pruned", None),
    ]
    sweep = write_sweep(members, line)
    found = table(sweep)
    assert cell(found, "lora", "accuracy").seeds == 1
    assert cell(found, "ia3", "accuracy") == Cell()
    assert cell(found, "ia3", "num_trainable_params") == Cell()
    failed, pruned = found.failed
    assert pruned.endswith("): pruned")
    assert failed.startswith("method=ia3 seed=0 (")
    assert failed.endswith("): out of memory")
    given = "peft-train -m +recipe=lora_minilm method=lora,ia3 seed=0,1"
    assert set(found.missing) == {given, f"{given} --retry-failed"}


def test_a_member_that_never_began_shares_what_the_sweep_did_not_vary(
    write_sweep: Callable[..., Path],
) -> None:
    members = [(["seed=0"], "done", 0.9), (["seed=1"], "waiting", None)]
    found = table(write_sweep(members, ["+recipe=lora_minilm", "seed=0,1"]))
    assert [row[0].text for row in found.rows] == ["lora"]
    assert found.missing == ("peft-train -m +recipe=lora_minilm seed=0,1",)


def test_a_sweep_that_told_its_seeds_apart_is_read_so(write_sweep: Callable[..., Path]) -> None:
    members = [
        (["optimizer.lr=0.001", "seed=0"], "done", 0.9),
        (["optimizer.lr=0.01", "seed=0"], "done", 0.8),
        (["optimizer.lr=0.001", "seed=10"], "done", 0.7),
    ]
    found = table(write_sweep(members, [], {"tuning_seeds": [0], "test_seeds": [10]}))
    assert cell(found, "lora", "accuracy").value == pytest.approx(0.7)
    assert cell(found, "lora", LR).value == 0.001


def test_numbers_that_are_not_finite_are_no_numbers(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", 0.9, seed=0)
    write_run("runs/b", float("nan"), seed=1)
    found = table(tmp_path / "runs")
    assert cell(found, "lora", "accuracy").seeds == 1
    assert "accuracy is not finite" in found.failed[0]


def test_a_torn_result_is_named(write_run: WriteRun, tmp_path: Path) -> None:
    folder = write_run("runs/a", 0.9)
    for text, said in (
        ("{", "cannot be read"),
        ("[]", "holds no mapping"),
        ('{"a": 1}', "is no result of peft-train: no run_info.train_config.run_dir"),
    ):
        (folder / "result.json").write_text(text)
        with pytest.raises(DataError, match=rf"result.json: {said}"):
            table(tmp_path / "runs")


def test_folders_inside_a_run_are_not_runs(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", 0.9)
    write_run("runs/a/previous/1", 0.1)
    write_run("runs/a/.hydra", 0.1)
    assert [run.folder.name for run in read_runs([tmp_path / "runs"])] == ["a"]
