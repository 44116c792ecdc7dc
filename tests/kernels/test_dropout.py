"""Dropout keeps its rate and its mean, and gradients go where numbers were kept."""

from __future__ import annotations

import pytest
import torch

from peftcli.kernels import dropout as module
from peftcli.kernels.dropout import dropout, keep_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_the_rate_is_kept(p: float) -> None:
    torch.manual_seed(0)
    mask, gain = keep_mask(torch.Size([1001, 1003]), p, CPU)
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert mask.double().mean().item() == pytest.approx(1 - p, abs=4 * deviation + 2**-17)
    assert gain == pytest.approx(1 / (1 - p), rel=1e-4)


def test_the_mean_is_exact_for_the_rate_that_is_drawn() -> None:
    p = 0.3
    _, gain = keep_mask(torch.Size([4]), p, CPU)
    kept = 1 - round(p * module.LEVELS) / module.LEVELS
    assert gain * kept == pytest.approx(1, abs=1e-12)


def test_neighbours_that_share_a_draw_are_independent() -> None:
    torch.manual_seed(0)
    mask, _ = keep_mask(torch.Size([200_000, 4]), 0.5, CPU)
    assert (torch.corrcoef(mask.double().T) - torch.eye(4)).abs().max() < 0.01


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 1), (0, 4)])
def test_outputs_and_gradients_are_masked_and_scaled_alike(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = (torch.rand(shape, dtype=torch.float64) + 1).requires_grad_()
    y = dropout(x, 0.4)
    kept, gain = y.detach() != 0, 1 / (1 - round(0.4 * 65536) / 65536)
    torch.testing.assert_close(y, x * kept * gain)
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy * kept * gain)


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings break it when they are errors
def test_compilation_sees_through_it() -> None:
    x = torch.ones(300, requires_grad=True)
    y = torch.compile(dropout, backend="aot_eager", fullgraph=True)(x, 0.5)
    assert set(y.tolist()) == {0.0, 2.0}
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())
