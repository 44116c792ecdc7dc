"""Two examples tell the memory of any number of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peftcli.methods.lora import LoRA
from peftcli.methods.oft import OFT
from peftcli.train import device, probe
from peftcli.train.estimate import Held, Load, Memory
from peftcli.train.preview import Preview
from peftcli.train.probe import Line, Working
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


MiB = 2**20


def test_growth_is_the_peak_and_what_stays() -> None:
    kept = []

    def work() -> None:
        passing = torch.ones(16 * MiB)  # 64 MiB
        kept.append(torch.ones(8 * MiB))
        del passing

    peak, stays = device.growth(work)
    assert 95 * MiB < peak < 110 * MiB
    assert 31 * MiB < stays < 40 * MiB


def test_weights_that_lie_mapped_in_a_file_are_counted_once_they_are_read(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(64 * MiB))
    mapped = torch.from_file(str(tmp_path / "weights"), shared=True, size=16 * MiB)
    peak, _ = device.growth(lambda: device.make_resident([mapped.view(4, -1)]))
    assert 60 * MiB < peak < 70 * MiB


def test_what_the_allocator_scatters_goes_with_the_tensors_that_come_and_go() -> None:
    held = Held(process=100, weights=50, deltas=5, gradients=5, optimizer=10)
    working = Working(Line(0, 10), Line(0, 2), Line(0, 1))
    whole = Memory(held, working, Load(20, 10, False, False), spread=1.5)
    assert (whole.activations, whole.logits, whole.passing, whole.gaps) == (200, 20, 220, 110)
    assert whole.total == 165 + 220 + 110
    assert whole.at(0.5).gaps == 55


def test_the_line_never_falls() -> None:
    assert probe.Line.through((10, 500), (20, 400)).at(40) == 500
    assert probe.Line.through((10, 500), (20, 900)).at(40) == 1700
    assert probe.Line.through((10, 500), (10, 500)).at(10) == 500
