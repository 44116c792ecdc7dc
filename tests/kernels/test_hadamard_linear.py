"""The product with a sparse Walsh-Hadamard spectrum equals that with the dense matrices, gradients
included.
"""

from __future__ import annotations

import pytest
import torch

from peftcli.kernels.hadamard import factors
from peftcli.kernels.hadamard_linear import Factors, Sparse, hadamard_linear, hadamard_linear_ref


@pytest.mark.parametrize("tokens", [2, 50])  # the transform of the inputs, and that of the weight
@pytest.mark.parametrize(("d_out", "d_in"), [(5, 8), (3, 12), (7, 1), (9, 20)])
@pytest.mark.parametrize("beside", [True, False])
def test_output_and_gradients_equal_the_dense_equation(
    tokens: int, d_out: int, d_in: int, beside: bool
) -> None:
    torch.manual_seed(0)
    W, b = torch.randn(d_out, d_in).double() if beside else None, torch.randn(d_out).double()
    x = torch.randn(tokens, d_in, dtype=torch.float64, requires_grad=True)
    v = torch.randn(max(1, d_out * d_in // 3), dtype=torch.float64, requires_grad=True)
    f = Sparse(v, torch.randperm(d_out * d_in)[: len(v)].int(), d_out)
    h = Factors(*(t.double() for t in factors(d_in)))
    outputs = [g(x, W, b, f, h, 0.7) for g in (hadamard_linear, hadamard_linear_ref)]
    torch.testing.assert_close(*outputs)
    dy = torch.randn_like(outputs[0])
    ours, plain = (torch.autograd.grad(y, (x, v), dy) for y in outputs)
    torch.testing.assert_close(ours, plain)
