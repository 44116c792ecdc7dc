"""Two examples tell the memory of any number of them."""

from __future__ import annotations

import pytest
import torch

from peftcli.methods.lora import LoRA
from peftcli.methods.oft import OFT
from peftcli.train import probe
from peftcli.train.preview import Preview
from tests.train.conftest import MakeLoop, chats


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", [LoRA(target_modules="all-linear"), OFT()], ids=["lora", "oft"])
def test_what_a_pass_saves_for_the_backward_one_is_a_line_in_the_rows(
    make_loop: MakeLoop, method: LoRA | OFT, packing: bool
) -> None:
    loop = make_loop(chats(80), packing=packing, method=method, dropout=0.1)
    cpu = torch.device("cpu")
    look = Preview(loop.host.model, "causal_lm", loop.examples, loop.collate, 8, 0, cpu)
    length = int(loop.lengths.max())
    alike = [example for example in loop.examples if len(example["input_ids"]) == length]
    assert len(alike) >= 6
    before = torch.get_rng_state()
    working = probe.measure(look, alike)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in loop.host.model.parameters())
    tokens, targets, saved, answering, turning = probe._pass(look, look.collate(alike[:6]))
    within = 0.2 if packing else 0.02  # packed, a beginning is shared only from two rows on
    assert working.saved.at(tokens) == pytest.approx(saved, rel=within)
    assert working.answering.at(targets) == pytest.approx(answering, rel=0.05)
    assert working.turning.at(tokens) == pytest.approx(turning, rel=0.25)
    assert saved > 10 * tokens * 32 * 4  # three blocks of width 32 in float32


def test_the_line_never_falls() -> None:
    assert probe.Line.through((10, 500), (20, 400)).at(40) == 500
    assert probe.Line.through((10, 500), (20, 900)).at(40) == 1700
    assert probe.Line.through((10, 500), (10, 500)).at(10) == 500
