"""A run that is killed at random moments, again and again, ends as if nothing had happened."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "soak.py"


def test_five_kills_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    soak = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", soak)
    spec.loader.exec_module(soak)
    for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PEFTCLI_CACHE", str(tmp_path / "cache"))
    words = [*soak.tiny_words(tmp_path), "trainer.max_steps=210", "trainer.save_steps=6"]
    outcome = soak.soak(words, 5, 0, tmp_path)
    assert not outcome.wrong
    assert outcome.kills == 5
    assert outcome.saves > 20
    assert (tmp_path / "killed" / "result.json").exists()
