"""Turning blocks of features equals the product with the block-diagonal matrix."""

from __future__ import annotations

import pytest
import torch

from peftcli.kernels.block_rotation import JOINED, block_rotation, block_rotation_ref

SHAPES = [((3,), 5, 1), ((2, 9), 12, 4), ((1, 1, 6), 1, 7), ((4,), 3, 33), ((2, 1), 34, 2)]


@pytest.mark.parametrize(("batch", "n", "b"), SHAPES)
@pytest.mark.parametrize("back", [False, True])
def test_values_and_gradients_equal_the_reference(
    batch: tuple[int, ...], n: int, b: int, back: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(*batch, n * b, dtype=torch.float64, requires_grad=True)
    R = torch.randn(n, b, b, dtype=torch.float64, requires_grad=True)
    turned = R.mT if back else R
    z, z_ref = block_rotation(x, turned), block_rotation_ref(x, turned)
    torch.testing.assert_close(z, z_ref, atol=1e-12, rtol=1e-12)
    dz = torch.randn_like(z)
    grads, wanted = (torch.autograd.grad(out, (x, R), dz) for out in (z, z_ref))
    torch.testing.assert_close(grads, wanted, atol=1e-11, rtol=1e-11)


def test_one_block_can_serve_all_features() -> None:
    x = torch.randn(3, 12, dtype=torch.float64)
    R = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    grads = [
        torch.autograd.grad(f(x, R.expand(3, -1, -1)).square().sum(), R)
        for f in (block_rotation, block_rotation_ref)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("n", "b"), [(3, 2), (2, JOINED)])
def test_gradients_pass_the_numerical_check(n: int, b: int) -> None:
    x = torch.randn(2, n * b, dtype=torch.float64, requires_grad=True)
    R = torch.randn(n, b, b, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block_rotation, (x, R))


@pytest.mark.filterwarnings("ignore")  # the compiler's own warnings break it when they are errors
def test_compilation_sees_through_it() -> None:
    x, R = torch.randn(3, 12, requires_grad=True), torch.randn(6, 2, 2, requires_grad=True)
    compiled = torch.compile(block_rotation, backend="aot_eager", fullgraph=True)
    z, z_ref = (f(x, R) for f in (compiled, block_rotation_ref))
    torch.testing.assert_close(z, z_ref)
    grads, wanted = (torch.autograd.grad(out.square().sum(), (x, R)) for out in (z, z_ref))
    torch.testing.assert_close(grads, wanted)
