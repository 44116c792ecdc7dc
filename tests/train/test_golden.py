"""What earlier versions wrote is read, and trained on from; what later ones write is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from peftcli.core.host import Host
from peftcli.errors import DataError
from peftcli.export import adapter
from peftcli.train import checkpoint
from tests import tiny
from tests.train.conftest import MakeLoop
from tests.train.golden.write import FOLDER, METHODS, STOP, TOTAL, answers, training

FORMATS = range(1, checkpoint.FORMAT + 1)
KEPT = [(version, name) for version in FORMATS for name in METHODS]


def golden(version: int, name: str) -> tuple[Path, dict[str, Any]]:
    place = FOLDER / f"format-{version}" / name
    return place, json.loads((place / "expected.json").read_text())


@pytest.mark.parametrize(("version", "name"), KEPT)
def test_a_checkpoint_of_every_format_is_gone_on_from(
    version: int, name: str, make_loop: MakeLoop, tmp_path: Path
) -> None:
    place, expected = golden(version, name)
    shutil.copytree(place / "checkpoints", tmp_path / "run" / "checkpoints")
    newest, skipped = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert not skipped
    loop = training(make_loop, tmp_path / "run", name)
    loop.restore(newest)
    assert loop.progress.step == STOP
    loop.fit()
    losses = [record["loss"] for record in loop.screen.records]
    assert len(losses) == TOTAL - STOP
    assert losses == pytest.approx(expected["losses"][STOP:], abs=1e-5)
    assert answers(loop.host) == pytest.approx(expected["logits"], abs=1e-5)


@pytest.mark.parametrize(("version", "name"), KEPT)
def test_an_adapter_of_every_format_answers_as_it_did(version: int, name: str) -> None:
    place, expected = golden(version, name)
    host = Host(tiny.models()["llama"]())
    adapter.load(host, place / "adapter")
    assert answers(host) == pytest.approx(expected["logits"], abs=1e-5)


def rewritten(file: Path, key: str) -> None:
    """The JSON file says that it is of the next format."""
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {key: checkpoint.FORMAT + 1}))


def test_a_checkpoint_of_a_newer_version_is_neither_read_nor_passed_over(
    make_loop: MakeLoop, tmp_path: Path
) -> None:
    loop = training(make_loop, tmp_path, "lora")
    loop.fit()
    rewritten(loop.folder.checkpoints / f"step-{TOTAL:06d}" / "manifest.json", "format")
    with pytest.raises(DataError, match=r"newer peftcli \(format 2; this one reads up to 1\)"):
        checkpoint.newest(loop.folder.checkpoints)


def test_an_adapter_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    place = shutil.copytree(golden(1, "ssf")[0] / "adapter", tmp_path / "adapter")
    rewritten(place / "adapter_config.json", "format")
    with pytest.raises(DataError, match=r"newer peftcli \(format 2; this one reads up to 1\)"):
        adapter.load(Host(tiny.models()["llama"]()), place)
