"""The LoRA linear, split at the thin activations h = x A':

y = x W' + s h B' + b          one product, the thin one in its epilogue; for DoRA also g y
u = s dy B,  dB = s dy' h      dy is read once for both
dx = dy W + u A                the first kernel again, on transposed views
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftcli.kernels.gpu.products import launch, options, tile


def product_plus(
    x: Tensor,
    W: Tensor,
    h: Tensor,
    B: Tensor,
    scale: float,
    b: Tensor | None = None,
    g: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """z = x W' + s h B' and y = g z + b, (M, N); z is None where there is no g. x (M, K), W (N, K),
    h (M, R), B (N, R) in any strides, b (N,), g (N,).
    """
    (M, K), N, R = x.shape, len(W), h.shape[1]
    y = x.new_empty(M, N)
    z = None if g is None else torch.empty_like(y)
    BM, BN = (min(64, tile(n)) for n in (M, N))
    launch(
        _product_plus,
        (triton.cdiv(M, BM) * triton.cdiv(N, BN),),
        *(x, W, h, B, b, g, y, z, M, N, K, R, scale),
        *(*x.stride(), *W.stride(), *h.stride(), *B.stride()),
        **{"BM": BM, "BN": BN, "BK": min(32, tile(K)), "BR": tile(R)},
        **{"HAS_BIAS": b is not None, "HAS_GAIN": g is not None},
        **options(),
    )
    return y, z


@triton.jit
def _product_plus(
    X, W, H, B, BIAS, G, Y, Z, M, N, K, R, scale,
    x_m, x_k, w_n, w_k, h_m, h_r, b_n, b_r,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(N, BN)
    m = (tl.program_id(0) // tiles_n).to(tl.int64) * BM + tl.arange(0, BM)
    n = (tl.program_id(0) % tiles_n).to(tl.int64) * BN + tl.arange(0, BN)
    k, r = tl.arange(0, BK), tl.arange(0, BR)
    in_m, in_n = m[:, None] < M, n[None, :] < N
    z = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        in_k = start + k < K
        x = tl.load(X + m[:, None] * x_m + (start + k) * x_k, in_m & in_k, 0.0)
        w = tl.load(W + n[None, :] * w_n + (start + k)[:, None] * w_k, in_n & in_k[:, None], 0.0)
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        z = tl.dot(x, w, z, input_precision=PRECISION)
    h = tl.load(H + m[:, None] * h_m + r * h_r, in_m & (r < R), 0.0)
    b = tl.load(B + n[None, :] * b_n + r[:, None] * b_r, in_n & (r < R)[:, None], 0.0)
    if UPCAST:
        h, b = h.to(tl.float32), b.to(tl.float32)
    z += scale * tl.dot(h, b, input_precision=PRECISION)
    at, inside = m[:, None] * N + n, in_m & in_n
    if HAS_GAIN:
        tl.store(Z + at, z, inside)
        z = z * tl.load(G + n, n < N, 0.0)
    if HAS_BIAS:
        z += tl.load(BIAS + n, n < N, 0.0)
    tl.store(Y + at, z, inside)


def thin_gradients(dy: Tensor, B: Tensor, h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """u = s dy B (M, R) and dB = s dy' h (N, R) in float32. dy (M, N), B (N, R), h (M, R)."""
    (M, N), R = dy.shape, B.shape[1]
    BM, BN = (min(64, tile(n)) for n in (M, N))
    parts = triton.cdiv(M, BM)
    u = dy.new_empty(M, R)
    dB = torch.empty(parts, N, R, dtype=torch.float32, device=dy.device)
    launch(
        _thin_gradients,
        (parts,),
        *(dy, B, h, u, dB, M, N, R, scale, *dy.stride(), *B.stride(), *h.stride()),
        **{"BM": BM, "BN": BN, "BR": tile(R)},
        **options(),
    )
    return u, dB.sum(0)


@triton.jit
def _thin_gradients(
    DY, B, H, U, DB, M, N, R, scale, dy_m, dy_n, b_n, b_r, h_m, h_r,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    m, r = part * BM + tl.arange(0, BM), tl.arange(0, BR)
    in_m, in_r = m[:, None] < M, r[None, :] < R
    h = tl.load(H + m[:, None] * h_m + r * h_r, in_m & in_r, 0.0)
    u = tl.zeros((BM, BR), tl.float32)
    if UPCAST:
        h = h.to(tl.float32)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        dy = tl.load(DY + m[:, None] * dy_m + n * dy_n, in_m & (n < N), 0.0)
        b = tl.load(B + n[:, None] * b_n + r * b_r, (n < N)[:, None] & in_r, 0.0)
        if UPCAST:
            dy, b = dy.to(tl.float32), b.to(tl.float32)
        u = tl.dot(dy, b, u, input_precision=PRECISION)
        dB = tl.dot(tl.trans(dy), h, input_precision=PRECISION)
        at = DB + part * N * R + n[:, None] * R + r
        tl.store(at, scale * dB, (n < N)[:, None] & in_r)
    tl.store(U + m[:, None] * R + r, scale * u, in_m & in_r)
