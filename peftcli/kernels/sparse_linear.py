"""y = W' x + b, where W' is a frozen W with `values` added at flat positions `indices`, as one
autograd node that saves little.

Beside `x`, only the indices and the values are saved: W' is made again in the backward pass. The
values' gradients are single entries of dy^T x. Few of them are summed one by one; many are picked
from the dense product, which is temporary and is shown to `watch` where something is to be chosen
by it. W' is a copy and never written into W: other nodes may hold W for their own backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftcli.kernels.choice import is_reference, takes_triton
from peftcli.kernels.precision import cast, product_dtype

Watch = Callable[[Tensor], None]  # is shown the gradient (O, I) of the dense weight

# Share of the entries up to which single sums beat the dense product: 4-8 ms against 6-12 ms at
# 0.2-0.5 %, 20 against 5-12 ms at 1-2 % (768 x 768, 512 tokens, float32, one CPU core, 2026-11).
FEW = 1 / 256
AT_ONCE = 2**20  # numbers gathered at once, from each side


def add_entries(W: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """A copy of `W` (O, I) with `values` (K,) added at the flat positions `indices` (K,), which
    differ from each other; every sum is rounded once, to the type of `W`.
    """
    flat = W.reshape(-1)
    return flat.index_put((indices,), (flat[indices] + values).to(W.dtype)).view(W.shape)


def spread(indices: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A matrix of zeros with `values` at the flat positions `indices`."""
    zeros = torch.zeros(shape, dtype=values.dtype, device=values.device)
    return zeros.view(-1).index_put((indices,), values).view(shape)


def sparse_linear_ref(
    x: Tensor,
    indices: Tensor,
    values: Tensor,
    d_out: int,
    W: Tensor | None = None,
    b: Tensor | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """The equation in plain torch. x (..., I), indices (K,), values (K,), W (O, I), b (O,) ->
    (..., O).
    """
    dW = spread(indices, values, (d_out, x.shape[-1]))
    if watch is not None and dW.requires_grad:
        dW.register_hook(watch)
    x, W, b = cast(product_dtype(x), x, W, b)
    return F.linear(x, (dW if W is None else W + dW).to(x.dtype), b)


def sparse_linear(
    x: Tensor,
    indices: Tensor,
    values: Tensor,
    d_out: int,
    W: Tensor | None = None,
    b: Tensor | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """W' x + b. x (..., I), indices (K,) distinct, values (K,), W (O, I) and b (O,) frozen ->
    (..., O); without W, the sparse product alone. `watch` sees the gradient (O, I) of the dense W'
    in the backward pass.
    """
    if is_reference():
        return sparse_linear_ref(x, indices, values, d_out, W, b, watch)
    x, W, b = cast(product_dtype(x), x, W, b)
    with torch.autocast(x.device.type, enabled=False):
        return _SparseLinear.apply(x, indices, values, d_out, W, b, watch)


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        indices: Tensor,
        values: Tensor,
        d_out: int,
        W: Tensor | None,
        b: Tensor | None,
        watch: Watch | None,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x_TI, indices, values, W)
        ctx.d_out, ctx.shape, ctx.watch = d_out, x.shape, watch
        y_TO = F.linear(x_TI, _changed(x_TI, indices, values, d_out, W), b)
        return y_TO.view(*x.shape[:-1], d_out)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x_TI, indices, values, W = ctx.saved_tensors
        dy_TO = dy.reshape(-1, ctx.d_out)
        dx = dvalues = None
        if ctx.needs_input_grad[0]:
            dx = (dy_TO @ _changed(x_TI, indices, values, ctx.d_out, W)).view(ctx.shape)
        if ctx.needs_input_grad[2]:
            dvalues = _entries(dy_TO, x_TI, indices, ctx.watch).to(values.dtype)
        return dx, None, dvalues, None, None, None, None


def _changed(x_TI: Tensor, indices: Tensor, values: Tensor, d_out: int, W: Tensor | None) -> Tensor:
    """W', (O, I)."""
    if W is not None:
        return add_entries(W, indices, values)
    return spread(indices, values.to(x_TI.dtype), (d_out, x_TI.shape[1]))


def _entries(dy_TO: Tensor, x_TI: Tensor, indices: Tensor, watch: Watch | None) -> Tensor:
    """(dy^T x) at the flat positions `indices`, (K,)."""
    T, d_in = x_TI.shape
    if watch is None and indices.numel() <= FEW * dy_TO.shape[1] * d_in:
        dy_OT, x_IT = dy_TO.T.contiguous(), x_TI.T.contiguous()
        if takes_triton("sparse_linear", dy_OT, x_IT):
            from peftcli.kernels.gpu import sparse_linear as gpu

            return gpu.entries(dy_OT, x_IT, indices)
        rows, columns = (indices // d_in).long(), (indices % d_in).long()
        size = max(AT_ONCE // max(T, 1), 1)
        pairs = zip(rows.split(size), columns.split(size), strict=True)
        return torch.cat([torch.linalg.vecdot(dy_OT[o], x_IT[i]) for o, i in pairs])
    grad_W = dy_TO.T @ x_TI
    if watch is not None:
        watch(grad_W)
    return grad_W.view(-1)[indices]
