"""The files of configs/model: every field with a comment; nothing but the name and the dimensions
differ.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from peftcli.settings import Model

FILES = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_model_file_has_every_field_with_its_default(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    assert values.pop("_target_") == "peftcli.settings.Model"
    assert list(values) == [field.name for field in dataclasses.fields(Model)]
    about = {"name_or_path": values["name_or_path"], "architecture": values["architecture"]}
    assert Model(**values) == Model(**about)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_model_file_starts_with_its_command_and_explains_every_field(file: Path) -> None:
    first, *rest = file.read_text().splitlines()
    assert re.match(rf"# peft-train (check )?model={file.stem}\b", first)
    fields = [line for line in rest if not line.startswith(("#", "_target_"))]
    assert all(" # " in line for line in fields)
    assert file.read_text().isascii()
