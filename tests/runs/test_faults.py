"""Whole runs on disks that fill up, in memory that runs out, with configurations, adapters and
models of strangers.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from peftcli import build
from peftcli import run as runs
from peftcli.cli import main
from peftcli.train import streams
from tests.conftest import Cli, environment, short_run, write_chats
from tests.train.test_faults import in_a_child

SECRETS = ("HF_TOKEN", "WANDB_API_KEY")


def in_a_shell(work: Callable[[], int]) -> tuple[int, str]:
    """Exit code and stderr of a forked process; a pipe takes what a limited file would not."""
    reads, writes = os.pipe()

    def speak() -> None:
        sys.stderr = os.fdopen(writes, "w")
        code = work()
        sys.stderr.flush()
        os._exit(code)

    code = os.waitstatus_to_exitcode(in_a_child(speak))
    os.close(writes)
    with os.fdopen(reads) as pipe:
        return code, pipe.read()


# -- verify-resume ---------------------------------------------------------------------------------
def test_verify_resume_says_exact_and_leaves_nothing(
    cli: Cli, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "here"))
    (tmp_path / "here").mkdir()
    before = sorted(tmp_path.rglob("*"))
    words = [*tiny_run, "method.dropout=0.1", "trainer.gradient_accumulation_steps=2"]
    done = cli("verify-resume", *words, "--steps", 4, "--stops", "1,3")
    assert "exact: stopped after step 1 and 3, and no bit differs" in done.stderr
    assert "32 in the same order" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_verify_resume_names_what_is_not_exact(
    cli: Cli, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "restore", lambda held: None)  # dropout starts again at each stop
    words = [*tiny_run, "method.dropout=0.1", "--steps", "3", "--json"]
    report = json.loads(cli("verify-resume", *words, code=1).stdout)
    assert report["differences"]["losses"].startswith("step 3")  # the first has a rate of 0
    assert "deltas.default" in report["differences"]["trained"]
    assert "examples" not in report["differences"]


# -- going on --------------------------------------------------------------------------------------
def test_a_run_that_goes_on_from_a_checkpoint_with_new_values_keeps_the_old_ones_steps_aside(
    cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    cli(*tiny_run, "trainer.save_steps=2", "trainer.save_total_limit=5")
    run = tmp_path / "run"
    old = (run / "checkpoints/step-000006/trained.safetensors").read_bytes()
    cli("train", "run", f"resume={run}/checkpoints/step-000002", "optimizer.lr=0.01")
    assert (run / "previous/1/checkpoints/step-000006/trained.safetensors").read_bytes() == old
    assert (run / "checkpoints/step-000006/trained.safetensors").read_bytes() != old
    assert (run / "previous/1/result.json").is_file()
    again = cli("train", "run")  # neither begins again, nor sees another configuration
    assert "finished" in again.stderr
    assert "lr: 0.01" in (run / "checkpoints/config.yaml").read_text()


# -- signals before training -----------------------------------------------------------------------
@pytest.mark.parametrize("phase", ["prepare", "load"])
def test_a_signal_before_there_is_anything_to_save_ends_the_run_at_once(
    phase: str, cli: Cli, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where long data are tokenised, or a large model is read."""
    place, name = (build, "prepare") if phase == "prepare" else (build.load, "load_model")
    went_on = []

    def signalled(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        went_on.append(phase)

    with monkeypatch.context() as patched:
        patched.setattr(place, name, signalled)
        cli(*tiny_run, code=75)
    assert not went_on
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    cli(*tiny_run, "trainer.max_steps=1")


# -- disks -----------------------------------------------------------------------------------------
def test_a_disk_without_room_for_the_checkpoints_is_refused_before_the_run(
    cli: Cli, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = cli("check", *tiny_run, "trainer.save_total_limit=3").stderr
    assert "a checkpoint, at most" in plan
    words = [*tiny_run, "trainer.save_total_limit=1000000000"]
    done = cli(*words, code=2)
    assert "trainer.save_total_limit=1000000000" in done.stderr
    assert "trainer.keep_bytes" in done.stderr
    cli("check", *words, "trainer.keep_bytes=1000000")


@pytest.mark.parametrize("room", [0, 20_000])
def test_a_disk_that_fills_up_during_a_run_is_one_message(
    cli: Cli, tiny_run: list[str], room: int
) -> None:
    words = [*tiny_run, "trainer.num_threads=1"]  # a forked process has no other threads
    cli("check", *words)  # data are in the cache

    def fill() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        return main(words)

    code, said = in_a_shell(fill)
    assert code == 3, said
    assert "File too large" in said
    assert "Traceback" not in said


# -- memory ----------------------------------------------------------------------------------------
def test_a_step_that_does_not_fit_ends_with_what_would(cli: Cli, tiny_run: list[str]) -> None:
    words = [*tiny_run, "trainer.per_device_train_batch_size=32", "trainer.num_threads=1"]
    cli("check", *words)

    def starve() -> int:
        plain = runs.make_loop

        def make_loop(*args: object) -> object:  # once all is loaded, 150 MB are left
            loop = plain(*args)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + 150_000_000
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            loop.step = lambda examples: torch.zeros(2**26).sum().item()
            return loop

        runs.make_loop = make_loop
        return main([*words, "trainer.max_steps=1"])

    code, said = in_a_shell(starve)
    assert code == 4, said
    for part in ("held at most", "estimated", "each needs less", "size=", "checkpointing=true"):
        assert part in said
    assert "Traceback" not in said


# -- strangers -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained_once(models: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for name in SECRETS:
            patch.setenv(name, f"secret-of-{name}")
        for name, value in environment(cache).items():
            patch.setenv(name, value)
        words = short_run(models, write_chats(folder), folder)
        assert main([*words, "trainer.max_steps=1"]) == 0
    return folder / "run"


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder."""
    for name in SECRETS:
        monkeypatch.setenv(name, f"secret-of-{name}")
    return Path(shutil.copytree(trained_once, tmp_path / "run"))


def own_target(run: Path) -> list[str]:
    text = (run / "config.yaml").read_text()
    found = "_target_: peftcli.methods.lora.LoRA"
    assert found in text
    (run / "config.yaml").write_text(text.replace(found, "_target_: os.system"))
    return ["eval", "run"]


def secret(run: Path) -> list[str]:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 0", "seed: ${oc.env:HF_TOKEN}", 1))
    return ["train", "run"]


def other_folder(run: Path) -> list[str]:
    return ["name=../../x", f"run_dir={run}-2"]


def callback(run: Path) -> list[str]:
    (run / "own" / "recipes").mkdir(parents=True)
    (run / "own" / "recipes" / "evil.yaml").write_text(
        "# @package _global_\nhydra:\n  callbacks:\n    x:\n      _target_: os.system\n"
    )
    return ["--config-dir", str(run / "own"), "+recipe=evil"]


def adapters_target(run: Path) -> list[str]:
    config = {"peft_type": "PEFTCLI_X", "method": {"_target_": "subprocess.Popen", "args": "id"}}
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return ["eval", "run"]


def pickled_adapter(run: Path) -> list[str]:
    weights = run / "adapter" / "adapter_model.safetensors"
    torch.save({"x": torch.ones(2)}, weights.with_name("adapter_model.bin"))
    weights.unlink()
    return ["eval", "run"]


def renamed_pickle(run: Path) -> list[str]:
    torch.save({"x": torch.ones(2)}, run / "adapter" / "adapter_model.safetensors")
    return ["eval", "run"]


def copy_of_the_model(run: Path) -> Path:
    text = (run / "config.yaml").read_text()
    source = Path(next(s for s in text.split() if s.endswith("/llama")))
    copy = run / "model"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def other_shards(run: Path) -> list[str]:
    copy = copy_of_the_model(run)
    index = {"weight_map": {"x": "../../elsewhere.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return [f"model.name_or_path={copy}", f"run_dir={run}-2"]


def own_code(run: Path) -> list[str]:
    copy = copy_of_the_model(run)
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text(f"open({str(run / 'ran')!r}, 'w')\nclass Config: pass\n")
    return [f"model.name_or_path={copy}", f"run_dir={run}-2"]


@pytest.mark.parametrize(
    ("attack", "code", "named"),
    [
        (own_target, 2, "method._target_=os.system"),
        (secret, 2, "HF_TOKEN looks like a secret"),
        (other_folder, 2, "name=../../x"),
        (callback, 2, "hydra.callbacks"),
        (adapters_target, 3, "method._target_=subprocess.Popen"),
        (pickled_adapter, 3, "adapter_model.safetensors is missing"),
        (renamed_pickle, 3, "adapter_model.safetensors is damaged"),
        (other_shards, 3, "no file's name in this folder"),
        (own_code, 3, "config.json"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_strangers_wrote_is_refused(
    attack: Callable[[Path], list[str]],
    code: int,
    named: str,
    cli: Cli,
    tiny_run: list[str],
    trained: Path,
) -> None:
    words = attack(trained)
    if "=" in words[0]:
        keys = {word.partition("=")[0] for word in words}
        words = [*(w for w in tiny_run if w.partition("=")[0] not in keys), *words]
    done = cli(*words, code=code)
    assert named in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (trained / "ran").exists()


def test_secrets_of_the_environment_reach_no_file(trained: Path) -> None:
    files = [path for path in trained.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if b"secret-of" in path.read_bytes()]


# -- a folder that goes away -----------------------------------------------------------------------
def test_a_lock_that_a_dead_process_left_holds_nobody_up(
    cli: Cli, tiny_run: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()

    def die_in_the_folder() -> None:
        from peftcli.train.folder import RunFolder

        with RunFolder(tmp_path / "run").locked():
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(die_in_the_folder) != 0
    assert "process" in (tmp_path / "run" / ".lock").read_text()
    cli(*tiny_run, "trainer.max_steps=1")
