"""What is built for others holds what a run needs, and works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files, as pip would lay them out."""
    built = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(built), versions=["standard"])
    folder = tmp_path_factory.mktemp("site-packages")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_configs_recipes_and_data_are_inside(installed: Path) -> None:
    for kind in ("configs", "recipes"):
        ours = {p.relative_to(ROOT / kind) for p in (ROOT / kind).rglob("*.yaml")}
        theirs = {
            p.relative_to(installed / "peftcli" / kind)
            for p in installed.rglob("*.yaml")
            if kind in p.parts
        }
        assert theirs == ours
    assert (installed / "peftcli" / "data" / "embedded" / "movie_reviews.jsonl.bz2").exists()
    assert not (installed / "tests").exists()


def test_it_runs_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    for words in (["+recipe=lora_llama", "--cfg", "job", "--resolve"], ["methods"], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "peftcli", *words],
            env={**os.environ, "PYTHONPATH": str(installed)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "lora" in done.stdout
    assert str(installed / "peftcli" / "recipes") in done.stdout


def test_the_metadata_name_the_command_and_the_licence(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    assert "peft-train = peftcli.__main__:main" in (info / "entry_points.txt").read_text()
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in project["optional-dependencies"]:
        assert f"Provides-Extra: {extra}" in metadata
