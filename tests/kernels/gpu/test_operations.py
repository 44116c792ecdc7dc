"""Whole operations through their kernels, forward and backward, against their references."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peftcli.kernels import choice
from peftcli.kernels.block_rotation import block_rotation, block_rotation_ref
from peftcli.kernels.dora_linear import dora_linear, dora_linear_ref
from peftcli.kernels.hadamard import factors, hadamard, hadamard_ref
from peftcli.kernels.lora_linear import Branch, lora_linear_ref, lora_linears
from peftcli.kernels.sparse_linear import sparse_linear, sparse_linear_ref


@pytest.fixture(autouse=True)
def _required(device: torch.device) -> object:
    with choice.using("require", device):
        yield


def agree(ours: Tensor, wanted: Tensor, trained: list[Tensor]) -> None:
    torch.testing.assert_close(ours, wanted, atol=1e-4, rtol=1e-4)
    dy = torch.randn_like(ours)
    grads, exact = (torch.autograd.grad(y, trained, dy) for y in (ours, wanted))
    torch.testing.assert_close(grads, exact, atol=1e-4, rtol=1e-4)


def leaves(device: torch.device, *sizes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size).to(device).requires_grad_() for size in sizes]


@pytest.mark.parametrize("count", [1, 2])
def test_the_lora_linear(count: int, device: torch.device) -> None:
    x, W, b, A, B = leaves(device, (3, 5, 7), (9, 7), (9,), (2, 7), (9, 2))
    W, b = W.detach(), b.detach()
    branches = [Branch(W, b, A, B, 0.5), Branch(W, None, A, B, 1.5)][:count]
    ours = torch.cat(lora_linears(x, branches), -1)
    agree(ours, torch.cat([lora_linear_ref(x, *branch) for branch in branches], -1), [x, A, B])


def test_the_dora_linear(device: torch.device) -> None:
    x, W, b, A, B, g = leaves(device, (3, 5, 7), (9, 7), (9,), (2, 7), (9, 2), (9,))
    W, b = W.detach(), b.detach()
    agree(*(f(x, W, b, A, B, g, 0.5) for f in (dora_linear, dora_linear_ref)), [x, A, B, g])


@pytest.mark.parametrize(("n", "b"), [(3, 4), (2, 33)])
def test_the_rotation(n: int, b: int, device: torch.device) -> None:
    x, R = leaves(device, (2, 5, n * b), (n, b, b))
    agree(block_rotation(x, R), block_rotation_ref(x, R), [x, R])


@pytest.mark.parametrize("d", [1, 16, 12, 72])
@pytest.mark.parametrize("inverse", [False, True])
def test_the_transform(d: int, inverse: bool, device: torch.device) -> None:
    (x,) = leaves(device, (2, 3, d))
    left, right = (t.to(device) for t in factors(d))
    agree(hadamard(x, left, right, inverse), hadamard_ref(x, inverse), [x])


def test_the_sparse_linear(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftcli.kernels.sparse_linear.FEW", 1.0)
    x, v, W = leaves(device, (2, 5, 8), (6,), (7, 8))
    at, W = torch.randperm(56)[:6].to(device, torch.int32), W.detach()
    forms: tuple[Callable[..., Tensor], ...] = (sparse_linear, sparse_linear_ref)
    agree(*(f(x, at, v, 7, W) for f in forms), [x, v])
