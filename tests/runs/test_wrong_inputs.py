"""Wrong inputs of forty kinds: one clear message that names the cause, the documented exit code,
no traceback, and nothing lost.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Cli

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
LINE = json.dumps({"messages": TURNS})


def broken_line(tmp_path: Path) -> str:
    lines = [LINE] * 30
    lines[16] = lines[16][:-4]
    (tmp_path / "broken.jsonl").write_text("\n".join(lines) + "\n")
    return "dataset.path=broken.jsonl"


def empty(tmp_path: Path) -> str:
    (tmp_path / "empty.jsonl").write_text("")
    return "dataset.path=empty.jsonl"


def latin1(tmp_path: Path) -> str:
    (tmp_path / "latin.jsonl").write_bytes(
        LINE.replace('"b"', '"caf\xe9"').encode("latin-1") + b"\n"
    )
    return "dataset.path=latin.jsonl"


def no_answers(tmp_path: Path) -> str:
    rows = [LINE.replace('"a"', f'"a{i}"') for i in range(30)]
    rows[1] = json.dumps({"messages": [{"role": "user", "content": "a"}]})
    (tmp_path / "mute.jsonl").write_text("\n".join(rows) + "\n")
    return "dataset.path=mute.jsonl"


def wrong_columns(tmp_path: Path) -> str:
    (tmp_path / "columns.csv").write_text("text,lable\na,1\n")
    return "dataset.path=columns.csv"


def cut_gzip(tmp_path: Path) -> str:
    packed = gzip.compress((LINE + "\n").encode() * 50)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-20])
    return "dataset.path=cut.jsonl.gz"


def cut_weights(tmp_path: Path, llama: Path) -> str:
    folder = tmp_path / "cut"
    folder.mkdir()
    for file in llama.iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(content[:-8] if file.suffix == ".safetensors" else content)
    return f"model.name_or_path={folder}"


def pickled_weights(tmp_path: Path, llama: Path) -> str:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in llama.iterdir():
        name = "pytorch_model.bin" if file.suffix == ".safetensors" else file.name
        (folder / name).write_bytes(file.read_bytes())
    return f"model.name_or_path={folder}"


# (words, exit code, what the message must hold)
CASES: dict[str, tuple[list[str | Callable[..., str]], int, list[str]]] = {
    "a misspelt group": (["modle=minilm"], 2, ["modle", "model"]),
    "a misspelt choice": (["method=lroa"], 2, ["lroa", "lora"]),
    "a misspelt recipe": (["+recipe=lora_lama"], 2, ["lora_lama", "lora_llama"]),
    "a misspelt top key": (["sede=3"], 2, ["sede", "seed"]),
    "a misspelt trainer key": (["trainer.max_stepz=3"], 2, ["max_stepz", "trainer.max_steps"]),
    "a misspelt method key": (["method.alhpa=3"], 2, ["alhpa", "method.alpha"]),
    "a familiar alias": (["method.lora_alpha=3"], 2, ["lora_alpha", "method.alpha"]),
    "another's name of a key": (["learning_rate=1e-3"], 2, ["learning_rate", "optimizer.lr"]),
    "a word for a number": (["trainer.max_steps=many"], 2, ["trainer.max_steps", "many"]),
    "a fraction for a count": (["method.r=2.5"], 2, ["method.r", "2.5"]),
    "rank 0": (["method.r=0"], 2, ["method.r", "0"]),
    "a dropout above 1": (["method.dropout=1.5"], 2, ["method.dropout", "1.5"]),
    "a negative rate": (["optimizer.lr=-1"], 2, ["optimizer.lr"]),
    "an unknown start": (["method.init=pizza"], 2, ["method.init", "pissa"]),
    "an unknown optimizer option": (["+optimizer.momentun=0.9"], 2, ["momentun"]),
    "a target that matches nothing": (["method.target_modules=[q,q_prj]"], 2, ["q_prj", "q_proj"]),
    "a broken expression": (["method.target_modules=['(']"], 2, ["method.target_modules"]),
    "a module that is not there": (["method.modules_to_save=[scor]"], 2, ["scor"]),
    "a strange target class": (["method._target_=os.system"], 2, ["os.system"]),
    "a syntax error": (["trainer.max_steps==3"], 2, ["trainer.max_steps"]),
    "no such model": (["model.name_or_path=/no/such/model"], 3, ["/no/such/model"]),
    "a model that is not installed": (["model.name_or_path=package:no-such"], 3, ["pip install"]),
    "no such file": (["dataset.path=chatz.jsonl"], 3, ["chatz.jsonl", "chats.jsonl"]),
    "broken JSON in line 17": ([broken_line], 3, ["broken.jsonl, line 17"]),
    "an empty file": ([empty], 3, ["empty.jsonl"]),
    "another encoding": ([latin1], 3, ["latin.jsonl", "UTF-8"]),
    "an example without an answer": ([no_answers], 3, ["mute.jsonl, line 2"]),
    "missing columns": ([wrong_columns, "dataset.format=classification"], 3, ["label", "lable"]),
    "a cut archive": ([cut_gzip], 3, ["cut.jsonl.gz"]),
    "examples too long": (["dataset.max_length=4"], 3, ["dataset.max_length", "on_overlong"]),
    "more held out than there is": (["dataset.eval_samples=400"], 3, ["eval_samples"]),
    "cut weights": ([cut_weights], 3, ["cut"]),
    "pickled weights": ([pickled_weights], 3, ["pytorch_model.bin", "safetensors"]),
    "an absent checkpoint": (["resume=nowhere/step-000004"], 2, ["nowhere/step-000004"]),
    "a task the data does not fit": (["model.task=regression"], 2, ["regression"]),
    "too much warm-up": (["scheduler.warmup_steps=500"], 2, ["scheduler.warmup_steps", "500"]),
    "a loss without choices": (["trainer.loss=tfew"], 2, ["trainer.loss=tfew", "choices"]),
    "packing where it cannot be": (["model=gpt2", "dataset.packing=maybe"], 2, ["dataset.packing"]),
    "remote code without a commit": (
        ["model.name_or_path=someone/model", "model.trust_remote_code=true"],
        2,
        ["model.revision"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_one_clear_message(
    case: str, cli: Cli, tiny_run: list[str], models: Path, tmp_path: Path
) -> None:
    words, code, expected = CASES[case]
    made = [
        w if isinstance(w, str) else w(*([tmp_path, models / "llama"][: w.__code__.co_argcount]))
        for w in words
    ]
    keys = {w.partition("=")[0] for w in made}
    done = cli(*[w for w in tiny_run if w.partition("=")[0] not in keys], *made, code=code)
    message = " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert "error:" in message
    for part in expected:
        assert part in message, message
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_folder_that_cannot_be_written(cli: Cli, tiny_run: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here already")
    words = [w for w in tiny_run if not w.startswith("run_dir")]
    done = cli(*words, f"run_dir={tmp_path / 'file' / 'run'}", code=2)
    assert "run_dir" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "here already"


def test_a_corrupted_adapter_and_a_truncated_checkpoint(
    cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    cli(*tiny_run)
    run = tmp_path / "run"
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    done = cli("eval", "run", code=3)
    assert "adapter_model.safetensors is damaged" in " ".join(done.stderr.split())
    last = run / "checkpoints" / "step-000006" / "trained.safetensors"
    os.truncate(last, 100)
    (run / "result.json").unlink()
    done = cli(*tiny_run, code=3)
    assert "trained.safetensors has 100 bytes" in " ".join(done.stderr.split())
    assert "resume=never" in done.stderr


def test_a_run_folder_that_is_none(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for words in (["eval", "bare"], ["export", "nowhere", "--to", "merged", "--output", "x"]):
        done = cli(*words, code=None)
        assert done.returncode in (2, 3)
        assert "Traceback" not in done.stderr
        assert words[1] in done.stderr


def test_a_missing_package_is_named_with_the_command_that_brings_it(
    cli: Cli, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    done = cli(*tiny_run, "logger=wandb", code=2)
    assert "pip install wandb" in done.stderr
