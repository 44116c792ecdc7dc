"""Hadamard matrices of every order that models need, and the fast transform against the dense."""

from __future__ import annotations

import pytest
import torch

from peftcli.kernels.hadamard import (
    factors,
    hadamard,
    hadamard_matrix,
    hadamard_ref,
    odd_order,
    sylvester,
    walsh,
)

PALEY = (12, 20, 44, 60, 108, 140, 28, 36, 76, 148, 40)
WIDTHS = {
    3072: 12, 2560: 20, 11008: 172, 14336: 28, 13824: 108, 8960: 140, 4864: 76, 18944: 148,
    576: 36, 4096: 1,
}  # fmt: skip


@pytest.mark.parametrize("d", [1, 2, 64, *PALEY, 172, 156, 48, 96])
def test_rows_are_orthogonal_and_of_ones(d: int) -> None:
    H = hadamard_matrix(d)
    assert torch.equal(H.abs(), torch.ones(d, d))
    assert torch.equal(H @ H.T, d * torch.eye(d))


@pytest.mark.parametrize("d", [1, 2, 32, 48, 28, 36, 72, 156, 172, 344])
def test_the_fast_transform_and_its_inverse_equal_the_dense_ones(d: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, d, dtype=torch.float64)
    left, right = factors(d)
    for inverse in (False, True):
        torch.testing.assert_close(hadamard(x, left, right, inverse), hadamard_ref(x, inverse))
    back = hadamard(hadamard(x, left, right), left, right, inverse=True)
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize(("width", "K"), WIDTHS.items())
def test_widths_of_models_split_near_their_root(width: int, K: int) -> None:
    assert odd_order(width) == K
    P, Q = map(len, factors(width))
    assert P * Q == width
    assert max(P, Q) <= 3 * width**0.5
    x = torch.randn(2, width, dtype=torch.float64)
    y = hadamard(x, *factors(width))
    torch.testing.assert_close(y.square().sum(), width * x.square().sum())
    torch.testing.assert_close(hadamard(y, *factors(width), inverse=True), x)


def test_sylvesters_transform_is_the_worked_example() -> None:
    x = torch.tensor([1.0, 2, 3, 4])
    y = hadamard(x, *factors(4))
    assert y.tolist() == [10, -2, -4, 0]
    assert torch.equal(hadamard(y, *factors(4)), 4 * x)
    i = torch.arange(16)
    bits = torch.tensor([[bin(int(a & b)).count("1") for b in i] for a in i])
    assert torch.equal(sylvester(16), (-1.0) ** bits)


def test_matrices_of_order_172_are_not_symmetric_so_the_transpose_matters() -> None:
    H = hadamard_matrix(172)
    assert not torch.equal(H, H.T)


def test_gradients_are_the_transposed_product() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 48, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 48, dtype=torch.float64)
    (dx,) = torch.autograd.grad(hadamard(x, *factors(48)), x, dy)
    torch.testing.assert_close(dx, dy @ hadamard_matrix(48).double().T)


@pytest.mark.parametrize("d", [6, 52, 100])
def test_an_unknown_order_is_refused(d: int) -> None:
    with pytest.raises(ValueError, match=f"order {d} "):
        factors(d)


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.full((1, 4096), 100.0, dtype=torch.float16)
    y = hadamard(x, *factors(4096))
    assert y.dtype == torch.float32
    assert y[0, 0] == 409_600  # beyond float16


@pytest.mark.parametrize("d", [1, 2, 8, 64, 128, 8192])
def test_long_transforms_equal_the_two_products(d: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, d, dtype=torch.float64)
    torch.testing.assert_close(walsh(x), hadamard(x, *factors(d)))
    torch.testing.assert_close(walsh(x, most=4), walsh(x))
    torch.testing.assert_close(walsh(walsh(x)), d * x)
