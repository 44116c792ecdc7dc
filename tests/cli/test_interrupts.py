"""Signals before a run has anything to save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peftcli import cli, interrupts


@pytest.fixture
def handlers() -> Iterator[None]:
    """Python's own, whatever a shell that runs the tests in its background has set; afterwards
    those of before.
    """
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupts.heard.clear()


@pytest.mark.parametrize("number", interrupts.SIGNALS)
def test_what_a_library_makes_of_an_interrupt_ends_with_75(
    handlers: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    def verb(words: list[str]) -> int:
        interrupts.until_a_run_has_its_own()
        try:
            os.kill(os.getpid(), number)
            return 0
        finally:
            raise UnboundLocalError("a file that was not open yet")

    monkeypatch.setitem(cli.VERBS, "doctor", verb)
    assert cli.main(["doctor"]) == 75
    assert capsys.readouterr().err == ""


def test_the_same_error_without_a_signal_is_ours(
    handlers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def verb(words: list[str]) -> int:
        interrupts.until_a_run_has_its_own()
        raise UnboundLocalError("a file that was not open yet")

    monkeypatch.setitem(cli.VERBS, "doctor", verb)
    assert cli.main(["doctor"]) == 1
    assert "mistake of peftcli" in capsys.readouterr().err


def test_an_interrupted_import_is_not_a_failed_one(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from peftcli import interrupts\n"
        "interrupts.until_a_run_has_its_own()\n"
        "try:\n    import slow\nexcept BaseException:\n    pass\n"
        "print('went on without it')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "", "")
