"""The products of the LoRA linear against float64, on odd shapes and strides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peftcli.kernels.gpu.lora_linear import product_plus, thin_gradients

SHAPES = [(3, 5, 7, 1), (70, 33, 65, 5), (16, 96, 80, 16)]  # M, K, N, R
DTYPES = [torch.float32, torch.float16]


def operands(device: torch.device, dtype: torch.dtype, *sizes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=draw).to(device, dtype) for s in sizes]


def near(got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """The error is at most twice that of plain torch in the same type, and one rounding."""
    error, allowed = (got - exact).norm(), (plain - exact).norm()
    assert error <= 2 * allowed + torch.finfo(plain.dtype).eps * exact.norm()


@pytest.mark.parametrize(("M", "K", "N", "R"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["bias", "gain", "transposed"])
def test_a_product_with_a_thin_one_in_its_epilogue(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, form: str, device: torch.device
) -> None:
    sizes = [(M, K), (N, K), (M, R), (N, R), (N,), (N,)]
    x, W, h, B, b, g = operands(device, dtype, *sizes)
    if form == "transposed":  # as in the backward pass
        W, B = W.T.contiguous().T, B.T.contiguous().T

    def plain(x: Tensor, W: Tensor, h: Tensor, B: Tensor, b: Tensor, g: Tensor) -> Tensor:
        z = x @ W.T + 0.7 * (h @ B.T)
        return {"bias": z + b, "gain": g * z + b, "transposed": z}[form]

    shift, gain = b if form != "transposed" else None, g if form == "gain" else None
    y, z = product_plus(x, W, h, B, 0.7, shift, gain)
    tensors = (x, W, h, B, b, g)
    near(y.double(), plain(*(t.double() for t in tensors)), plain(*tensors))
    assert (z is None) == (form != "gain")
    if z is not None:
        torch.testing.assert_close(g * z + b, y, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("M", "N", "R"), [(3, 7, 1), (130, 65, 5), (16, 80, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_thin_gradients(M: int, N: int, R: int, dtype: torch.dtype, device: torch.device) -> None:
    dy, B, h = operands(device, dtype, (M, N), (N, R), (M, R))
    u, dB = thin_gradients(dy, B, h, 0.3)
    near(u.double(), 0.3 * dy.double() @ B.double(), 0.3 * dy @ B)
    near(dB.double(), 0.3 * dy.double().T @ h.double(), 0.3 * dy.T @ h)
    assert dB.dtype == torch.float32
