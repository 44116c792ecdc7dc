"""A whole run: what it leaves, that others can read it, and that interruptions leave no trace in
it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftcli.train.folder import RunFolder
from tests.conftest import Cli, environment, signalled


def test_a_run_leaves_its_folder(cli: Cli, tiny_run: list[str], tmp_path: Path) -> None:
    done = cli(*tiny_run)
    run = tmp_path / "run"
    wanted = ".hydra config.yaml train.log metrics.jsonl result.json adapter checkpoints"
    assert {p.name for p in run.iterdir()} >= set(wanted.split())
    names = {p.name for p in (run / "adapter").iterdir()}
    assert names >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "tokenizer.json",
    }
    result = json.loads((run / "result.json").read_text())
    assert set(result) == {"run_info", "train_info", "meta_info"}
    assert result["train_info"]["steps"] == 6
    assert result["train_info"]["num_trainable_params"] == 4 * 3 * (
        2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48)
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6]
    assert "all-linear: 21" in done.stderr
    assert str(run / "adapter") in "".join(done.stderr.split())  # long paths are wrapped


def test_the_adapter_loads_in_stock_peft_and_the_merged_model_in_plain_transformers(
    cli: Cli, tiny_run: list[str], models: Path, tmp_path: Path
) -> None:
    cli(*tiny_run)
    cli("export", "run", "--to", "merged", "--output", "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    ids = tokenizer("what is two plus one", return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(models / "llama", dtype=torch.float32)
    with torch.no_grad():
        plain = base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(
            ids
        ).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)
    assert (adapted - plain).abs().max() > 1e-3


def test_a_second_start_of_a_finished_run_changes_nothing(
    cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    cli(*tiny_run)
    before = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    again = cli(*tiny_run)
    assert "finished" in again.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_run_of_an_earlier_version_that_lacks_groups_and_keys_goes_on(
    cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    cli(*tiny_run)
    (run_dir / "result.json").unlink()
    for path in (run_dir / "config.yaml", run_dir / "checkpoints" / "config.yaml"):
        written = OmegaConf.load(path)
        del written.launch, written.trainer.compile, written.method.dropout
        OmegaConf.save(written, path)
    assert "resuming after step" in cli(str(run_dir)).stderr
    assert (run_dir / "result.json").exists()


def test_another_configuration_in_the_same_folder_is_refused_with_the_difference(
    cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    cli(*tiny_run)
    refused = cli(*tiny_run, "optimizer.lr=0.5", code=2)
    assert "optimizer.lr: 0.0002 there, 0.5 now" in refused.stderr.replace("\n", " ")
    assert (tmp_path / "run" / "result.json").exists()
    cli(*tiny_run, "optimizer.lr=0.5", "resume=never")
    assert (tmp_path / "run" / "previous" / "1" / "result.json").exists()


def test_a_run_imports_neither_other_adapters_nor_a_compiler_nor_figures(
    tiny_run: list[str], cache: Path, tmp_path: Path
) -> None:
    """Each takes seconds of every start; LoRA on a plain model needs none."""
    heavy = "peft bitsandbytes deepspeed datasets pandas pyarrow sklearn matplotlib"
    heavy += " torchmetrics wandb optuna torch._inductor.lowering"
    code = (
        "import sys; from peftcli.cli import main; code = main(sys.argv[1:]);"
        f"sys.exit(code or ' '.join(m for m in {heavy.split()} if m in sys.modules) or 0)"
    )
    command = [sys.executable, "-c", code, *tiny_run, "trainer.max_steps=1"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(cache), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]


def start(words: list[str], cache: Path, cwd: Path) -> subprocess.Popen[str]:
    """A run in a process of its own that hears SIGINT, also where the tests run in a shell's
    background, which has its jobs ignore it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "peftcli", *words],
            cwd=cwd,
            env=environment(cache),
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def test_forty_steps_interrupted_at_7_and_23_end_bit_identical(
    cli: Cli, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [w for w in tiny_run if not w.startswith(("run_dir", "trainer.max_steps"))]
    words += ["trainer.max_steps=40", "trainer.eval_steps=10", "method.dropout=0.1"]
    cli(*words, f"run_dir={tmp_path / 'straight'}")
    broken = tmp_path / "broken"
    for step in (7, 23):
        signalled(monkeypatch, step)
        err = cli(*words, f"run_dir={broken}", code=75).stderr
        assert f"after step {step} of 40" in err
        assert "Traceback" not in err
    cli(*words, f"run_dir={broken}")
    straight = tmp_path / "straight"
    for name in (
        "adapter/adapter_model.safetensors",
        "checkpoints/step-000040/optimizer.safetensors",
    ):
        a, b = (load_file(folder / name) for folder in (straight, broken))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    lines = [
        [
            {**json.loads(line), "wall": None}
            for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
        for folder in (straight, broken)
    ]
    assert lines[0] == lines[1]


def test_sigint_in_the_first_moments_ends_with_75_and_no_traceback(
    tiny_run: list[str], cache: Path, tmp_path: Path
) -> None:
    for delay in (0.3, 1.5, 3.0):
        process = start(tiny_run, cache, tmp_path)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if process.returncode not in (75, 0):  # only where Python itself was not up yet
            assert "peftcli" not in err, err
        else:
            assert "Traceback" not in err


def test_two_runs_in_one_folder_are_refused(cli: Cli, tiny_run: list[str], tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run").locked():
        refused = cli(*tiny_run, code=2)
    told = " ".join(refused.stderr.split())
    assert f"in use by another run ({socket.gethostname()} process {os.getpid()})" in told


def test_an_adapter_with_a_head_of_the_datas_classes_is_written_again(
    cli: Cli, models: Path, tmp_path: Path
) -> None:
    rows = [json.dumps({"text": f"film {i}", "label": ["bad", "good"][i % 2]}) for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))  # two classes; the model's files have 3
    words = ["+recipe=lora_minilm", f"model.name_or_path={models / 'bert'}"]
    data = ["dataset.path=rows.jsonl", "dataset.train_samples=null", "dataset.eval_samples=2"]
    cli(*words, *data, "trainer.max_steps=1", "run_dir=run")
    cli("export", "run", "--to", "adapter", "--output", "again")
    files = [tmp_path / f / "adapter_model.safetensors" for f in ("run/adapter", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_loggers_work_offline(cli: Cli, tiny_run: list[str], tmp_path: Path, logger: str) -> None:
    if logger == "tensorboard":
        pytest.importorskip("tensorboard", reason="an extra")
    cli(*tiny_run, f"logger={logger}")
    assert any((tmp_path / "run" / logger).rglob("*"))


def test_a_run_whose_logger_is_not_let_in_is_kept_offline(
    cli: Cli, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    done = cli(*tiny_run, "logger=wandb", "logger.mode=online", "trainer.max_steps=1")
    assert "The run is kept offline; `wandb sync" in " ".join(done.stderr.split())
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
