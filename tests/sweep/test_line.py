"""What a sweep's line means: members by Hydra's grammar, their names, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from peftcli import config, hydra_app
from peftcli.errors import ConfigError, DataError
from peftcli.settings import Sweep
from peftcli.sweep import engine
from peftcli.sweep.ledger import Ledger
from peftcli.sweep.line import Composer
from tests.sweep import quick

GIVEN = ("+recipe=lora_llama_chat", "dataset.path=x", "model.name_or_path=x")


@pytest.fixture(scope="module")
def composer() -> Composer:
    return Composer()


def test_choices_ranges_and_globs_are_a_grid(composer: Composer) -> None:
    words = ("method=lora,dora", "seed=range(0,3)", "optimizer.lr=choice(1e-4,3e-4)")
    line = composer.read([*GIVEN, *words, "sweep.jobs=2"])
    assert line.space.keys == ["method", "seed", "optimizer.lr"]
    assert len(line.grid) == 12
    assert line.grid[0] == ("method=lora", "seed=0", "optimizer.lr=0.0001")
    assert line.grid[1][2] == "optimizer.lr=0.0003"
    assert line.base == GIVEN
    assert (line.sweep.jobs, line.name) == (2, "lora_llama_chat")
    assert line.folder.parent == Path("multirun/lora_llama_chat")
    assert len(composer.read([*GIVEN, "scheduler=glob(co*)"]).grid) == 3


def test_of_words_for_one_key_the_last_counts(composer: Composer) -> None:
    recipe = ["+recipe=methods_minilm", "method=lora,ssf"]
    assert composer.read(recipe).space.keys == ["method", "optimizer.lr"]
    fixed = composer.read([*recipe, "optimizer.lr=1e-3"])
    assert (fixed.space.keys, fixed.base[1:]) == (["method"], ("optimizer.lr=1e-3",))
    assert composer.read([*GIVEN, "seed=0,1", "seed=3"]).base == (*GIVEN, "seed=3")
    assert composer.read([*GIVEN, "seed=3", "seed=0,1"]).base == GIVEN


def test_how_members_are_run_is_no_part_of_them(composer: Composer) -> None:
    ids = {
        composer.member([*composer.read([*GIVEN, *more]).base, "seed=1"])[0]
        for more in ([], ["sweep.jobs=3"], ["sweep_dir=a"], ["name=b"], ["logger=tensorboard"])
    }
    assert len(ids) == 1
    id, cfg = composer.member([*GIVEN, "seed=2"])
    assert id not in ids
    assert "sweep" not in cfg
    assert "sweep_dir" not in cfg
    lines = [composer.read([*GIVEN, *more]) for more in ([], ["sweep.timeout=9"], ["seed=1"])]
    assert lines[0].identity == lines[1].identity != lines[2].identity


@pytest.mark.parametrize(
    "words",
    [
        ("method=dora", "method.r=4", "seed=3"),
        ("scheduler.kwargs.num_cycles=2", "scheduler=cosine", "~dataset.max_length"),
        ("method=ssf", "method.r=4"),
        ("+seed=1",),
        ("method={r: 4}", "optimizer.lr=1e-3", "optimizer.lr=2e-3"),
        ("dataset.path=${hydra:runtime.choices.method}", "name=${method.r}_runs"),
        ("sed=1",),
    ],
)
def test_values_put_over_composed_files_are_what_hydra_composes(
    composer: Composer, words: tuple[str, ...]
) -> None:
    given = hydra_app.normalised([*GIVEN, "run_dir=x", *words], [])

    def made(compose: Callable[[], DictConfig]) -> Any:
        try:
            cfg = compose()
            config.typed(cfg)
            return config.resolved(cfg)
        except ConfigError as e:
            return str(e)

    assert made(lambda: composer.member(given)[1]) == made(lambda: hydra_app.compose(given))


def test_what_cannot_be_composed_is_listed_and_the_others_are_planned(composer: Composer) -> None:
    line = composer.read([*GIVEN, "method=lora,ssf,lora", "method.r=4"])
    lora, ssf = engine.plan(line.grid, line, composer)
    assert lora.cfg is not None
    assert ssf.cfg is None
    assert "method.r" in (ssf.reason or "")
    assert ssf.exit_code == 2


def test_a_line_of_which_no_member_can_be_run_is_refused(
    composer: Composer, tmp_path: Path
) -> None:
    line = composer.read([*GIVEN, "optimizer.lrr=1,2", f"sweep_dir={tmp_path / 's'}"])
    with pytest.raises(ConfigError, match=r"mean optimizer\.lr\? Of 2 members none can be run"):
        engine.run(line.grid, line, composer)
    assert not line.folder.exists()


def test_the_data_of_tuning_are_not_reported_on(composer: Composer) -> None:
    planned = engine.plan([()], composer.read(GIVEN), composer)
    engine.check(Sweep(report_on={"dataset.path": "y"}), planned)
    with pytest.raises(ConfigError, match="name other data"):
        engine.check(Sweep(report_on={"dataset.path": "x"}), planned)


def test_a_damaged_record_says_what_to_take_away(tmp_path: Path) -> None:
    ledger = quick.planned(tmp_path / "s", ["m=1"])
    (tmp_path / "s" / "members" / "000000000001" / "member.json").write_text("{")
    with pytest.raises(DataError, match=r"Take .*000000000001 away"):
        ledger.members()


def test_members_that_can_be_composed_now_replace_their_failures(
    composer: Composer, tmp_path: Path
) -> None:
    planned = engine.plan([("method.r=4",)], composer.read(GIVEN), composer)
    failed = engine.Planned(planned[0].unmade_id, planned[0].words, planned[0].unmade_id, None, "x")
    ledger = Ledger(tmp_path / "s")
    for members in ([failed], planned, planned):
        with ledger.locked():
            engine.add(members, ledger)
    (member,) = ledger.members()
    assert (member.id, member.state) == (planned[0].id, "waiting")
    assert (ledger.run_dir(member.id) / "config.yaml").exists()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("run_dir=x", "sweep_dir=FOLDER"),
        ("resume=never", "leave it out"),
        ("sweep.jobs=1,2", "one value"),
        ("sweep.job=1", "sweep.jobs"),
        ("sweep.jobs=0", ">= 1"),
        ("sweep.launcher=slrum", "submitit"),
        ("hydra/launcher=joblib", "sweep.launcher"),
    ],
)
def test_what_a_sweep_cannot_mean_is_refused(composer: Composer, word: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        composer.read([*GIVEN, "seed=0,1", word])
