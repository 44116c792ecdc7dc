"""Why two runs have different numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from peftcli.tables.diff import Two, compare
from peftcli.tables.runs import read_run
from tests.tables.conftest import WriteRun

if TYPE_CHECKING:
    from tests.conftest import Cli


def test_the_first_step_that_differs_and_by_how_much(write_run: WriteRun) -> None:
    a = write_run("a", 0.9, losses=(1.0, 0.5, 0.25, 0.1))
    b = write_run("b", 0.8, losses=(1.0, 0.5, 0.26, 0.4), **{"optimizer.lr": 0.02})
    found = compare(read_run(a), read_run(b))
    assert found.departure is not None
    assert (found.departure.step, found.departure.same_steps) == (3, 2)
    assert found.departure.values == (Two("loss", 0.25, 0.26),)
    assert (found.departure.largest_step, found.departure.largest) == (4, Two("loss", 0.1, 0.4))
    assert [two.what for two in found.configuration] == ["optimizer.lr"]
    assert found.same_start is True
    assert (
        found.why
        == "They were asked for different things (optimizer.lr); initial weights: the same."
    )


def test_causes_come_in_their_order(write_run: WriteRun) -> None:
    def why(name: str, meta: dict[str, object], **keys: object) -> str:
        other = write_run(name, 0.8, meta=meta, losses=(0.9,), **keys)
        return compare(read_run(base), read_run(other)).why

    base = write_run("base", 0.9, losses=(1.0,))
    assert "different data" in why("a", {"dataset": {"sha256": "9"}}, **{"dataset.seed": 3})
    assert "(versions.torch)" in why(
        "b", {"package_info": {"torch": "3", "transformers": "5.23.0"}}
    )
    assert "began with different bits" in why("c", {"state_before_sha256": "9"})
    assert "not deterministic" in why("d", {})
    assert compare(read_run(base), read_run(base)).why == "Nothing recorded differs."


def test_another_methods_options_are_named_by_the_method(write_run: WriteRun) -> None:
    a, b = write_run("a", 0.9, method="lora"), write_run("b", 0.9, method="ia3")
    found = compare(read_run(a), read_run(b))
    assert "(method)" in found.why
    assert Two("method.r", 8, "-") in found.configuration


def test_the_verb_shows_it_and_gives_json(write_run: WriteRun, tmp_path: Path, cli: Cli) -> None:
    a = write_run("a", 0.9, losses=(1.0,), seed=0)
    b = write_run("b", 0.8, losses=(0.9,), seed=1)
    shown = cli("diff", a, b).stdout
    assert "asked for different things (seed)" in shown
    assert "step 1: loss, the first to differ" in shown
    data = json.loads(cli("diff", a, b, "--json").stdout)
    assert data["departure"]["step"] == 1
    assert "holds 2 runs; name one" in cli("diff", tmp_path, b, code=2).stderr
