"""The other kernels against float64: rotation, Walsh-Hadamard, single entries of a product."""

from __future__ import annotations

import pytest
import torch

from peftcli.kernels.gpu import block_rotation, hadamard, sparse_linear
from peftcli.kernels.hadamard import sylvester

DTYPES = [torch.float32, torch.float16]


def close(got: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), exact, atol=8 * eps * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize(("T", "n", "D"), [(3, 2, 4), (70, 3, 16), (5, 1, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_turn_and_their_gradients_add_up(
    T: int, n: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    x, dz = (torch.randn(T, n, D).to(device, dtype) for _ in range(2))
    J = torch.randn(n, D, D).to(device, dtype)
    turn = lambda R: torch.einsum("tni,nio->tno", x.double(), R.double())  # noqa: E731
    close(block_rotation.turned(x, J), turn(J), dtype)
    close(block_rotation.turned(x, J.mT), turn(J.mT), dtype)
    exact = torch.einsum("tni,tno->nio", x.double(), dz.double())
    close(block_rotation.outer(x, dz), exact, torch.float32)


@pytest.mark.parametrize(("M", "D"), [(3, 1), (5, 2), (7, 64), (1, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_transform_equals_the_dense_matrix(
    M: int, D: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    x = torch.randn(M, D).to(device, dtype)
    close(hadamard.walsh(x), x.double() @ sylvester(D).double().to(device), dtype)


@pytest.mark.parametrize(
    ("T", "d_out", "d_in", "k"), [(3, 5, 7, 1), (150, 9, 4, 36), (64, 20, 31, 90)]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_entries_are_those_of_the_dense_product(
    T: int, d_out: int, d_in: int, k: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    dy, x = (torch.randn(d, T).to(device, dtype) for d in (d_out, d_in))
    at = torch.randperm(d_out * d_in)[:k].to(device, torch.int32)
    exact = (dy.double() @ x.double().T).flatten()[at.long()]
    close(sparse_linear.entries(dy, x, at), exact, torch.float32)
