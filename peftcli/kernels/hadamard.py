"""x H and x H^-1 for Hadamard matrices H (d, d) of entries +-1 with H H' = d I, over the last axis.

d = K 2^m. H = H_K' kron S, with Sylvester's S of order 2^m in natural order and H_K of order 4o for
the odd part o of d: Paley's first or second construction, or Williamson's for 156 and 172. Because
a Kronecker product acts as a product from each side on a matrix, x H is two small products: with x
as a matrix (P, Q), PQ = d, it is left x right, left = H_K kron S_a, right = S_b, for P near Q near
the root of d. That is d (P + Q) multiplications a row in place of d^2, all in matrix units.

H_K need not be symmetric: the inverse takes its transpose.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference, takes_triton

IN_REGISTERS = 16384  # numbers of a row that the GPU kernel takes

# First rows of the symmetric circulants A, B, C, D of Williamson's construction.
WILLIAMSON = {
    172: (
        "+---++--++++-+-+++-++--++-+++-+-++++--++---",
        "++-++++++----+-+--++-++-++--+-+----++++++-+",
        "+++-+-++--+-+-++++-+----+-++++-+-+--++-+-++",
        "++---++++-+--+--++--------++--+--+-++++---+",
    ),
    156: (
        "+++--+-+-----+--++----++--+-----+-+--++",
        "++++---+--++----+-+--+-+----++--+---+++",
        "+++--++-+---+-+--+----+--+-+---+-++--++",
        "+---++-+-+-----+++-++-+++-----+-+-++---",
    ),
}


def hadamard_ref(x: Tensor, inverse: bool = False) -> Tensor:
    """x H, or x H' / d, by the dense matrix. x (..., d)."""
    H = hadamard_matrix(x.shape[-1]).to(x)
    return x @ H.T / x.shape[-1] if inverse else x @ H


def hadamard(x: Tensor, left: Tensor, right: Tensor, inverse: bool = False) -> Tensor:
    """x H, or x H' / d, in at least the precision of the `factors` left (P, P) and right (Q, Q);
    x (..., PQ).
    """
    with torch.autocast(x.device.type, enabled=False):  # sums of d terms overflow half precision
        if is_reference():
            return hadamard_ref(x.to(torch.promote_types(x.dtype, left.dtype)), inverse)
        X = x.to(torch.promote_types(x.dtype, left.dtype)).unflatten(-1, (len(left), len(right)))
        left, right = left.to(X.dtype), right.to(X.dtype)
        if x.shape[-1] <= IN_REGISTERS and takes_triton("hadamard", X):
            return _by_rows(X.flatten(-2), left, inverse)
        if inverse:
            left = left.T / x.shape[-1]
        return (left @ (X @ right)).flatten(-2)


def _by_rows(x: Tensor, left: Tensor, inverse: bool) -> Tensor:
    """x H or x H^-1 with S whole in one kernel: H_K X S for rows X (K, 2^m)."""
    d, K = x.shape[-1], odd_order(x.shape[-1])
    X: Any = _Walsh.apply(x.reshape(-1, d // K))
    step = len(left) // K  # left = H_K kron S_a, and S_a begins with 1
    H_K = left[::step, ::step]
    H_K = H_K.T / d if inverse else H_K
    return (H_K @ X.view(*x.shape[:-1], K, -1)).flatten(-2)


class _Walsh(torch.autograd.Function):
    """x S, which is symmetric, by the GPU kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from peftcli.kernels.gpu import hadamard as gpu

        return gpu.walsh(x.contiguous())

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> Tensor:
        from peftcli.kernels.gpu import hadamard as gpu

        return gpu.walsh(grad_outputs[0].contiguous())


def factors(d: int) -> tuple[Tensor, Tensor]:
    """(H_K kron S_a, S_b) whose sizes multiply to d and are near each other. Raises ValueError for
    an order that no construction here makes.
    """
    K = odd_order(d)
    free = (d // K).bit_length() - 1  # d = K 2^free
    a = max(0, round((free - math.log2(K)) / 2))
    H_K = _odd_part(K)
    return torch.kron(H_K, sylvester(2**a)), sylvester(2 ** (free - a))


def hadamard_matrix(d: int) -> Tensor:
    """H = H_K' kron S (d, d)."""
    K = odd_order(d)
    return torch.kron(_odd_part(K).T.contiguous(), sylvester(d // K))


def odd_order(d: int) -> int:
    """K of d = K 2^m: 4 times the odd part of d, or 1 for powers of two. Raises ValueError where
    there is no construction.
    """
    odd = d // (d & -d)
    if odd == 1:
        return 1
    K = 4 * odd
    if d % K or not (K in WILLIAMSON or _is_prime(K - 1) or _second_paley(K)):
        raise ValueError(f"no Hadamard matrix of order {d} is known here")
    return K


def sylvester(d: int) -> Tensor:
    """Sylvester's matrix (d, d), d a power of two: S[i, j] = -1 to the number of common bits."""
    S = torch.ones(1, 1)
    while len(S) < d:
        S = torch.cat([torch.cat([S, S], 1), torch.cat([S, -S], 1)])
    return S


def _odd_part(K: int) -> Tensor:
    """H_K (K, K)."""
    if K == 1:
        return torch.ones(1, 1)
    if K in WILLIAMSON:
        return _williamson(*WILLIAMSON[K])
    if _is_prime(K - 1):
        S = _bordered(K - 1, -1.0)
        return S + torch.eye(K)
    S, eye = _bordered(K // 2 - 1, 1.0), torch.eye(K // 2)
    plus, minus = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
    return torch.kron(S, plus) + torch.kron(eye, minus)


def _bordered(p: int, corner: float) -> Tensor:
    """[[0, 1'], [corner, Q]] with Q_ij = chi(i - j mod p), the quadratic character."""
    squares = {i * i % p for i in range(1, p)}
    chi = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, p)])
    i = torch.arange(p)
    S = torch.zeros(p + 1, p + 1)
    S[0, 1:], S[1:, 0] = 1.0, corner
    S[1:, 1:] = chi[(i[:, None] - i) % p]
    return S


def _williamson(*rows: str) -> Tensor:
    A, B, C, D = (_circulant(torch.tensor([1.0 if c == "+" else -1.0 for c in r])) for r in rows)
    blocks = ((A, B, C, D), (-B, A, -D, C), (-C, D, A, -B), (-D, -C, B, A))
    return torch.cat([torch.cat(row, 1) for row in blocks])


def _circulant(row: Tensor) -> Tensor:
    i = torch.arange(len(row))
    return row[(i - i[:, None]) % len(row)]


def _second_paley(K: int) -> bool:
    p = K // 2 - 1
    return p % 4 == 1 and _is_prime(p)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, int(n**0.5) + 1))


def walsh(x: Tensor, most: int = 16) -> Tensor:
    """x S over the last axis, of a power of two, not normalised; for long axes: few small products
    of nearly the same size, each with Sylvester's matrix of at most `most` rows. With 16 rows, 2^20
    float32 numbers take 1.7 ms, with 64, 16 in the last, 4.4 (two cores, 2026-11).
    """
    inner, shape = x.shape[-1], x.shape
    bits, widest = inner.bit_length() - 1, most.bit_length() - 1
    n = -(-bits // widest)
    for i in range(n):
        size = 2 ** ((bits + i) // n)
        inner //= size
        S, x = sylvester(size).to(x), x.reshape(-1, size, inner)
        # not S @ x, which turns x around before
        x = x.flatten(1) @ S if inner == 1 else torch.bmm(S.expand(len(x), size, size), x)
    return x.reshape(shape)
