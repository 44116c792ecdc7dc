"""Law: a run of any method that was stopped, and that computed the longest micro-batch ahead of its
training, ends bit for bit as if nothing had happened.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftcli.errors import NotApplicable
from tests.laws.test_method_laws import METHODS, make_method
from tests.train import conftest
from tests.train.conftest import MakeLoop, interrupted

make_loop = conftest.make_loop  # the fixture


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_stopped_ends_bit_for_bit_the_same(
    method: str, make_loop: MakeLoop, tmp_path: Path
) -> None:
    options = {"max_steps": 6, "lr": 1e-3, "method": make_method(method)}
    try:
        straight = make_loop(folder=tmp_path / "straight", **options)
    except NotApplicable as refusal:
        pytest.skip(f"refused: {refusal}")
    straight.fit()
    wanted = {n: t.clone() for n, t in straight.host.state().items()}
    paused = interrupted(make_loop, tmp_path / "paused", [1, 4], longest_first=True, **options)
    state = paused.host.state()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(t, wanted[n]) for n, t in state.items())
