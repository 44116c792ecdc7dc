"""The command line from outside: verbs, help, exit codes, Hydra's flags, completion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftcli import __version__, cli
from peftcli.errors import DataError, NonFinite, OutOfMemory
from tests.conftest import Cli

ROOT = Path(__file__).parents[2]


def start(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`peft-train` in a process of its own, in whatever folder the test is."""
    return subprocess.run(
        [sys.executable, "-m", "peftcli", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def seconds(*words: str) -> float:
    """The fastest of three starts."""
    times = []
    for _ in range(3):
        before = time.perf_counter()
        assert start(*words).returncode == 0
        times.append(time.perf_counter() - before)
    return min(times)


# -- Speed -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "forbidden"),
    [
        (["--help"], ("torch", "hydra", "omegaconf", "pydantic", "rich")),
        (["--version"], ("torch", "hydra", "yaml")),
        (["methods"], ("torch", "hydra", "pydantic")),
        (["methods", "lora"], ("torch", "hydra", "pydantic")),
        (["explain", "trainer.max_steps"], ("torch", "hydra", "pydantic")),
        (["--cfg", "job", "--resolve"], ("torch", "transformers", "rich")),
        (["-sc", "query=bash"], ("torch", "transformers", "rich")),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_verb_imports_only_what_it_needs(words: list[str], forbidden: tuple[str, ...]) -> None:
    code = (
        "import sys; from peftcli.cli import main; code = main(sys.argv[1:]);"
        f"bad = [m for m in {forbidden} if m in sys.modules]; sys.exit(repr(bad) if bad else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COMP_LINE": "peft-train tr"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_help_comes_at_once_and_a_configuration_soon() -> None:
    """Measured on two quiet cores: 0.11 s and 0.45 s; the limits leave slack for busy ones."""
    assert seconds("--help") < 0.5
    assert seconds("--cfg", "job", "--resolve") < 2.0


# -- Help and documentation ------------------------------------------------------------------------
def test_help_tells_verbs_folders_and_exit_codes_and_fits_a_terminal(cli: Cli) -> None:
    page = cli("--help").stdout
    assert cli().stdout == page
    for word in ("train", "check", "eval", "generate", "export", "methods", "explain", "doctor"):
        assert f"\n  {word} " in page
    assert "\n  worker " not in page
    assert str(ROOT / "recipes") in page
    assert "75 stopped" in page
    assert max(map(len, page.splitlines())) <= 110


@pytest.mark.parametrize(
    "verb", ["train", "check", "eval", "generate", "export", "methods", "explain", "doctor"]
)
def test_every_verb_has_a_page(cli: Cli, verb: str) -> None:
    assert f"peft-train {verb}" in cli(verb, "--help").stdout.replace("[train]", "train")


def test_version(cli: Cli) -> None:
    assert cli("--version").stdout == f"peftcli {__version__}\n"


def test_methods_shows_all_and_one(cli: Cli) -> None:
    table = cli("methods").stdout
    assert "low-rank" in table
    assert "LoRA: Low-Rank Adaptation" in table
    page = cli("methods", "lora").stdout
    assert "y = W x + b + s B A x" in page
    assert "numerator of the scale" in page
    assert {m["name"] for m in json.loads(cli("methods", "--json").stdout)} >= {"lora", "full"}
    (r,) = [
        o
        for o in json.loads(cli("methods", "lora", "--json").stdout)["options"]
        if o["name"] == "r"
    ]
    assert r == {
        "name": "r",
        "default": "8",
        "takes": "a whole number >= 1",
        "meaning": "rank, from 1",
    }
    assert "Did you mean lora" in cli("methods", "lroa", code=2).stderr


def test_explain_tells_of_keys_groups_choices_and_recipes(cli: Cli) -> None:
    page = cli("explain", "trainer.max_grad_norm").stdout
    for part in ("a number > 0 | null", "1.0", "no clipping", "configs/trainer/default.yaml"):
        assert part in page
    assert "method.alpha" in cli("explain", "lora_alpha").stdout
    assert "trainer.max_steps" in cli("explain", "max_steps").stdout
    assert "dataset=tweets" in cli("explain", "dataset").stdout
    assert "momentum" in cli("explain", "optimizer=sgd").stdout
    assert "+recipe=lora_llama" in cli("explain", "recipe").stdout
    assert "override /model" in cli("explain", "recipe=lora_llama").stdout
    assert "smollm2_135m" in cli("explain").stdout
    assert json.loads(cli("explain", "seed", "--json").stdout)[0]["default"] == "0"
    assert "Did you mean trainer.max_steps" in cli("explain", "trainer.max_stpes", code=2).stderr


def test_doctor_reports_versions_and_devices(cli: Cli) -> None:
    found = json.loads(cli("doctor", "--json").stdout)
    assert found["needed"]["torch"]
    assert found["machine"]["cores"] >= 1
    assert isinstance(found["machine"]["bf16"], bool)
    assert "hydra-core" in cli("doctor").stdout


# -- Exit codes ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "error", [DataError, OutOfMemory, NonFinite, ValueError, KeyboardInterrupt]
)
def test_an_error_becomes_its_exit_code(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: list[str]) -> int:
        raise error("what [bold]went[/bold] wrong " + "x" * 200)

    monkeypatch.setitem(cli.VERBS, "doctor", fail)
    code = cli.main(["doctor"])
    shown = capsys.readouterr().err
    expected = {ValueError: 1, KeyboardInterrupt: 75}
    assert code == expected.get(error, getattr(error, "exit_code", None))
    if error is KeyboardInterrupt:
        assert shown == ""
    else:
        assert "what [bold]went[/bold] wrong " + "x" * 200 in shown  # as it is, on one line
        assert ("Traceback" in shown) == (error is ValueError)


def test_tracebacks_are_shown_where_asked_for() -> None:
    for variable in ("PEFTCLI_TRACEBACK", "HYDRA_FULL_ERROR"):
        done = start("trainer.max_stps=1", **{variable: "1"})
        assert done.returncode == 2
        assert "Traceback" in done.stderr
        assert "Did you mean trainer.max_steps" in done.stderr


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m peftcli methods lora | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", command],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


# (words, what the one message must hold)
WRONG = {
    "an unknown flag": (["--frobnicate"], ["--frobnicate", "--help"]),
    "another tool's flag": (["--learning_rate", "1e-4"], ["optimizer.lr=1e-4"]),
    "a flag with its value": (["--lora-alpha=4"], ["method.alpha=4"]),
    "a misspelt verb": (["evla", "x"], ["evla", "Did you mean eval"]),
    "a recipe by its file": (["train", "my.yaml"], ["my.yaml", "recipes", "+recipe=my"]),
    "an alias at the top": (["lora_alpha=3"], ["lora_alpha", "method.alpha"]),
    "an alias in its group": (["method.lora_alpha=3"], ["method.alpha"]),
    "an alias in another group": (["trainer.learning_rate=1"], ["optimizer.lr"]),
    "a key of another group": (["trainer.lr=1"], ["optimizer.lr"]),
    "a key without its group": (["max_steps=1"], ["trainer.max_steps"]),
    "a misspelt group of a key": (["trianer.max_steps=1"], ["trainer.max_steps"]),
    "a key of another choice": (["method=full", "method.r=1"], ["method=full", "method=lora"]),
    "a key added that exists": (["+method.r=1"], ["method.r", "leave out the +"]),
    "a group added that exists": (["+model=gpt2"], ["model", "without +"]),
    "a key removed that is none": (["~trainer.max_stps"], ["trainer.max_steps"]),
    "a group removed": (["~trainer"], ["trainer", "default"]),
    "a number for a group": (["trainer=3"], ["trainer=3", "default"]),
    "null for a group": (["optimizer=null"], ["optimizer", "adamw"]),
    "null where there is none": (["seed=null"], ["seed", "a whole number"]),
    "a missing value": (["dataset=file"], ["dataset.path", "VALUE"]),
    "a list where there is one value": (["trainer.max_steps=[1,2]"], ["trainer.max_steps"]),
    "several values without -m": (["seed=0,1"], ["seed=0,1", "-m", "seed=[0,1]"]),
    "a number for a name": (["name=3"], ["name=3", "text"]),
    "a path for a name": (["name=../x"], ["name=../x"]),
    "an infinite number": (["optimizer.lr=inf"], ["optimizer.lr", "finite"]),
    "an interpolation of nothing": (["trainer.max_steps=${steps}"], ["trainer.max_steps", "steps"]),
    "a part of a list": (["method.target_modules.x=q"], ["method.target_modules", "whole"]),
    "a wrong entry of a mapping": (["method.rank_pattern.q=x"], ["method.rank_pattern.q", ">= 0"]),
    "a wrong key of a source": (["dataset.mixture=[{path: a, wieght: 1}]"], ["mixture[0].weight"]),
    "a wrong optimizer option": (["optimizer.betas=0.9"], ["optimizer.betas", "[0.9, 0.999]"]),
    "an optimizer that is none": (["optimizer._target_=torch.optim.AdmaW"], ["torch.optim.AdmaW"]),
    "spaces without quotes": (["name=a b c=d"], ["name=a b c=d", "quotes"]),
    "nothing": ([""], ["key=value"]),
    "half an option": (["="], ["key=value"]),
    "an absent folder of configs": (["-cd", "nowhere"], ["nowhere"]),
    "an absent primary file": (["-cn", "nothing"], ["nothing.yaml"]),
    "two commands": (["--cfg", "job", "-m"], ["--multirun"]),
    "an unknown part to show": (["--cfg", "jobs"], ["jobs", "job"]),
    "an absent run folder": (["eval", "outputs/nothing"], ["outputs/nothing"]),
    "export without a place": (["export", "."], ["--output"]),
    "a strange export": (["export", ".", "--to", "onnx", "--output", "x"], ["onnx", "merged"]),
    "no new tokens": (["generate", "--prompt", "x", "--max-new-tokens", "0"], ["from 1"]),
    "a run folder for a sweep": (["-m", "seed=0,1", "run_dir=x"], ["sweep_dir"]),
    "a sweep's key for one run": (["sweep.jobs=2"], ["sweep.jobs=2", "-m"]),
    "a sweep's flag for one run": (["--dry-run"], ["-m"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_line_is_one_message_and_leaves_nothing(
    case: str, cli: Cli, tmp_path: Path
) -> None:
    words, expected = WRONG[case]
    done = cli(*words, code=2)
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    for part in expected:
        assert part in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_all_wrong_keys_are_told_at_once(cli: Cli) -> None:
    message = cli("method.r=0", "trainer.max_steps=x", "optimizer.lr=-1", code=2).stderr
    for part in (
        "method.r=0",
        "trainer.max_steps=x",
        "optimizer.lr=-1",
        "configs/method/lora.yaml",
    ):
        assert part in message


# -- Hydra's flags ---------------------------------------------------------------------------------
def test_the_configuration_is_shown_as_hydra_shows_it(cli: Cli, tmp_path: Path) -> None:
    job = cli("+recipe=lora_llama", "method.r=3", "--cfg", "job", "--resolve").stdout
    assert "name: lora_llama\n" in job
    assert "r: 3\n" in job
    assert "hydra" not in job
    assert "# @package method" in cli("--cfg", "job", "-p", "method").stdout
    assert "sweep:" in cli("--cfg", "hydra").stdout
    assert "recipes://" in cli("--info", "searchpath").stdout
    assert "recipe/lora_llama" in cli("+recipe=lora_llama", "--info", "defaults").stdout
    assert "Hydra" in cli("--hydra-help").stdout
    assert list(tmp_path.iterdir()) == []


def test_flags_may_stand_between_overrides(cli: Cli) -> None:
    job = cli("method.r=3", "--cfg", "job", "method.alpha=5").stdout
    assert "r: 3\n" in job
    assert "alpha: 5\n" in job


COMPLETIONS = {
    "tr": {"train", "trainer."},
    "+recipe=lora_l": {"+recipe=lora_llama", "+recipe=lora_llama_chat"},
    "+rec": {"+recipe="},
    "method=": {"method=lora", "method=full"},
    "trainer.max_s": {"trainer.max_steps="},
    "train +recipe=lora_llama optimizer.l": {"optimizer.lr="},
    "check method=f": {"method=full"},
    "eval outputs/run dataset=twe": {"dataset=tweets"},
    "-m method=l": {"method=lora"},
    "explain trainer.max_g": {"trainer.max_grad_norm"},
    "methods lo": {"lora"},
}


@pytest.mark.parametrize("line", COMPLETIONS)
def test_the_shell_completes(line: str, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", f"peft-train {line}")
    assert COMPLETIONS[line] <= set(cli("-sc", "query=bash").stdout.split())


def test_completion_is_installed_for_the_program_s_name(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/peft-train"])
    for shell in ("bash", "zsh", "fish"):
        assert "peft-train" in cli("-sc", f"install={shell}").stdout
