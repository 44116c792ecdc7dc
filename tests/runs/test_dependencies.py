"""What is installed with peftcli is all that a run needs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import environment
from tests.models.test_convert import write_gguf

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def brought() -> set[str]:
    """Names of the distributions that `dependencies` bring, directly or not."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    found: set[str] = {"peftcli", "pip", "setuptools"}
    waiting = list(project["dependencies"])
    while waiting:
        wanted = Requirement(waiting.pop())
        extras = wanted.extras or {""}
        applies = wanted.marker is None or any(
            wanted.marker.evaluate({"extra": ""}) for _ in extras
        )
        name = canonicalize_name(wanted.name)
        if not applies or name in found:
            continue
        try:
            waiting += requires(name) or []
        except PackageNotFoundError:
            continue
        found.add(name)
    return found


def test_a_gguf_file_is_read_trained_and_answers_with_what_is_always_installed(
    tiny_run: list[str], models: Path, cache: Path, tmp_path: Path
) -> None:
    write_gguf(models / "llama", tmp_path / "tiny.gguf", "gpt-2")
    ours = brought()
    others = [
        module
        for module, distributions in packages_distributions().items()
        if not any(canonicalize_name(d) in ours for d in distributions)
    ]
    assert {"peft", "bitsandbytes", "pytest"} <= set(others)
    words = [*tiny_run, f"model.name_or_path={tmp_path / 'tiny.gguf'}", "trainer.max_steps=1"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others}));"
        "from peftcli.cli import main;"
        f"sys.exit(main({words}) or main(['generate', 'run', '--prompt', 'one plus']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(cache),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-1500:]
