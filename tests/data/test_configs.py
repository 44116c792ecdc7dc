"""The files of the dataset group: every field, in order, with what the dataclass says about it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerBase

from peftcli.data import embedded
from peftcli.data.prepare import prepare
from peftcli.settings import Dataset, Source, Task

FOLDER = Path(__file__).parents[2] / "configs" / "dataset"
FILES = sorted(FOLDER.glob("*.yaml"))
FIELDS = [field.name for field in dataclasses.fields(Dataset)]


def load(path: Path) -> dict[str, Any]:
    """The file's keys and values."""
    return yaml.safe_load(path.read_text())


def settings(path: Path) -> Dataset:
    """The file as the typed settings."""
    values = load(path)
    assert values.pop("_target_") == "peftcli.settings.Dataset"
    values["mixture"] = tuple(Source(**source) for source in values["mixture"])
    values["choices"] = values["choices"] and tuple(values["choices"])
    return Dataset(**values)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_hold_every_field_in_order_with_its_comment(path: Path) -> None:
    assert path.read_text().startswith("# peft-train ")
    assert list(load(path)) == ["_target_", *FIELDS]
    written = dict(re.findall(r"^(\w+):.*?  # (.*)$", path.read_text(), re.MULTILINE))
    field = r"^    (\w+): (?:(?!^    \w+: )[^#])*?# (.*)$"  # up to its comment, not into the next
    declared = re.findall(field, inspect.getsource(Dataset), re.MULTILINE)
    assert len(declared) > 15
    for name, comment in declared:
        if name not in (
            "format",
            "train_on",
        ):  # whose choices stand in the type, not in the comment
            assert written[name] == comment


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_change_only_what_they_are_about(path: Path) -> None:
    changed = {name for name in FIELDS if getattr(settings(path), name) != getattr(Dataset(), name)}
    about = {"path", "mixture", "name", "format", "columns", "system", "prompt", "choices"}
    assert changed <= about | {"train_samples", "eval_split", "eval_samples", "max_length"}


@pytest.mark.parametrize("name", [*embedded.QUESTIONS])
def test_embedded_files_say_what_the_name_alone_implies(name: str) -> None:
    cfg = settings(FOLDER / f"{name}.yaml")
    implied = embedded.complete(Dataset(path=name), "causal_lm")
    for key in ("format", "system", "prompt", "choices"):
        assert getattr(cfg, key) == getattr(implied, key)
    assert embedded.complete(cfg, "causal_lm").columns == implied.columns


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if load(p)["path"] in (None, *embedded.QUESTIONS)],
    ids=lambda p: p.stem,
)
def test_files_of_embedded_sets_can_be_prepared(
    path: Path, chat: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    cfg = settings(path)
    tasks: dict[str, Task] = {"classification": "classification", "regression": "regression"}
    few = {"train_samples": 20, "eval_samples": 8, "max_length": 2000}
    task = tasks.get(cfg.format, "causal_lm")
    data = prepare(dataclasses.replace(cfg, **few), task, chat, cache_dir=tmp_path)
    assert (len(data.train), len(data.eval or ())) == (20, 8)
