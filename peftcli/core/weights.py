"""Storage of weights: the one file that knows how modules keep theirs.

Every weight is shown to the equations as a dense (O, I) matrix: a convolution's kernel is flattened
to (O, I/groups * kernel), GPT-2's `Conv1D` gives its transpose, an embedding table (V, D) is the
linear map of one-hot rows and so gives (D, V), a norm's scale (C,) gives (C, 1), with the 1 that
Gemma's kind adds to it. Weights in few bits (bitsandbytes', or packed by GPTQ or AWQ) are
shown dequantised, exactly as their own product sees them.
"""

from __future__ import annotations

import inspect
import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from peftcli.core.packed import PackedLinear

_CHANNELS_FIRST = (_ConvNd, _NormBase, nn.GroupNorm)
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def has_weight_matrix(module: nn.Module) -> bool:
    """Whether the module multiplies its input by one weight that `dense` can show."""
    return isinstance(module, nn.Linear | Conv1D | _ConvNd | nn.Embedding)


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether `cls.forward` on the module is just W x + b with a frozen, dense, floating-point
    weight and a frozen bias.
    """
    forward_is_stock = cls.forward in (nn.Linear.forward, Conv1D.forward)
    if not forward_is_stock or is_quantised(module):
        return False
    weight, bias = weight_of(module), cast(Tensor | None, module.bias)
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    return weight.is_floating_point() and frozen


def is_quantised(module: nn.Module) -> bool:
    """Whether the weight is stored in 8 bits or fewer."""
    return bits(module) is not None


def bits(module: nn.Module) -> int | None:
    """In how many bits the weight is quantised; None where it is not."""
    if isinstance(module, PackedLinear):
        return module.packing.bits
    return {"Params4bit": 4, "Int8Params": 8}.get(type(getattr(module, "weight", None)).__name__)


def kind_of(module: nn.Module) -> str:
    """The site kind of a module with a weight matrix: 'linear', 'conv' or 'embedding'."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "conv" if isinstance(module, _ConvNd) else "linear"


def channel_axis(module: nn.Module) -> int:
    """The axis of the module's output (and input) that counts its channels: 1 behind a convolution
    or a norm of images, else the last.
    """
    channels_first = getattr(module, "data_format", "") == "channels_first"
    return 1 if channels_first or isinstance(module, _CHANNELS_FIRST) else -1


def along(v: Tensor, y: Tensor, axis: int) -> Tensor:
    """The vector `v` (C,) shaped to lie along the `axis` of `y`, 1 or -1."""
    return v if axis == -1 else v.view(-1, *[1] * (y.ndim - 2))


def weight_of(module: nn.Module) -> nn.Parameter:
    """The parameter as it is stored."""
    return cast(nn.Parameter, module.weight)


def whole(weight: Tensor) -> Tensor:
    """The weight itself, or gathered where it is cut up over ranks (by FSDP2, by DeepSpeed)."""
    w: Any = weight
    if hasattr(w, "full_tensor"):
        return w.full_tensor()
    if not _is_away(w):
        return weight
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([w]):
        return w.detach().clone()


def _is_away(weight: Any) -> bool:
    """Whether DeepSpeed has only a piece of it here now."""
    status = getattr(weight, "ds_status", None)
    return status is not None and status.name == "NOT_AVAILABLE"


def dense(module: nn.Module) -> Tensor:
    """The module's weight as a dense (O, I) matrix; a view of the parameter where its storage
    allows. Outside of a forward pass a weight that is cut up over ranks is gathered: there all of
    them must ask for it.
    """
    weight: Any = whole(weight_of(module))
    if is_quantised(module):
        return _dequantised(module, weight)
    if isinstance(module, Conv1D | nn.Embedding):
        return weight.T
    if weight.ndim == 1:
        return (weight + offset if (offset := _scale_offset(module)) else weight)[:, None]
    return weight.flatten(1)


def _scale_offset(norm: nn.Module) -> float:
    """What the norm adds to its weight to make its scale, read off its output for a row of ones: 1
    in Gemma's kind, else 0.
    """
    cls, weight = _bare_class(norm), weight_of(norm)
    takes_more = len(inspect.signature(cls.forward).parameters) > 2
    if hasattr(norm, "bias") or isinstance(norm, nn.RMSNorm) or takes_more:
        return 0.0
    with torch.no_grad():
        scale = cast(Any, cls).forward(norm, torch.ones_like(weight)[None])
        return float((scale - weight).mean().round())


def _bare_class(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "graft_of", type(module))


def _dequantised(module: Any, weight: Any) -> Tensor:
    if isinstance(module, PackedLinear):
        return module.dequantised()
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    scales = weight.SCB if weight.SCB is not None else module.state.SCB  # moves at the first call
    return weight.data.to(scales.dtype) * (scales / 127.0)[:, None]


def shape(module: nn.Module) -> tuple[int, int]:
    """(O, I) of `dense(module)`, without touching the values."""
    if is_quantised(module):
        linear = cast(nn.Linear, module)
        return linear.out_features, linear.in_features
    weight: Any = weight_of(module)
    first, *rest = getattr(weight, "ds_shape", weight.shape)
    if isinstance(module, Conv1D | nn.Embedding):
        return rest[0], first
    return first, math.prod(rest)


def sizes(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many numbers each parameter holds; those in few bits are several in a byte or word."""
    found = {p: getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
    for module in model.modules():
        if is_quantised(module):
            found[weight_of(module)] = math.prod(shape(module))
    return found


@torch.no_grad()
def write(module: nn.Module, W: Tensor, b: Tensor | None) -> None:
    """Store the (O, I) matrix `W` and the bias `b` in the module; a module without a bias gains one
    where `b` is given.
    """
    weight, m = weight_of(module), cast(Any, module)
    if weight.ndim == 1:
        W = W - _scale_offset(module)
    weight.copy_(W.T if isinstance(module, Conv1D | nn.Embedding) else W.reshape(weight.shape))
    if b is None:
        return
    if m.bias is None:
        m.bias = nn.Parameter(b.detach().to(weight.dtype).clone(), requires_grad=False)
    else:
        m.bias.copy_(b)


@torch.no_grad()
def requantise(module: nn.Module, W: Tensor) -> None:
    """Store `W` (O, I) in a module of bitsandbytes', in the bits and the way of the weight it
    has.
    """
    m, old = cast(Any, module), cast(Any, weight_of(module))
    dtype = dense(module).dtype
    if bits(module) == 8:
        m.weight = type(old)(W.to("cpu", dtype), requires_grad=False).to(old.device)
        m.state.CB = m.state.SCB = None  # of the old weight; made anew at the next call
        return
    kept = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    options = {name: getattr(old, name) for name in kept}
    new = type(old)(W.to("cpu", dtype), requires_grad=False, module=module, **options)
    m.weight = new.to(old.device)


def apply(module: nn.Module, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
    """The product that `module` would make with the (R, I) matrix `W` in place of its own; R rows
    need not be its O.
    """
    if isinstance(module, nn.Embedding):
        y = F.embedding(x, W.T)
        scale = getattr(module, "embed_scale", None)  # Gemma and BART multiply what they look up
        return y if scale is None else y * torch.as_tensor(scale, dtype=y.dtype, device=y.device)
    if isinstance(module, _ConvNd):
        if module.padding_mode != "zeros":
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = module.padding if module.padding_mode == "zeros" else 0
        kernel = W.view(W.shape[0], -1, *module.kernel_size)
        convolve = _CONVOLVE[len(module.kernel_size)]
        return convolve(x, kernel, b, module.stride, padding, module.dilation, module.groups)
    if weight_of(module).ndim == 1:
        return _normalise(module, x, W[:, 0], b)
    return F.linear(x, W, b)


def _normalise(norm: nn.Module, x: Tensor, scale: Tensor, b: Tensor | None) -> Tensor:
    """The output of the norm with another scale (C,) and bias (C,)."""
    cls = _bare_class(norm)
    twin = cls.__new__(cls)
    own: dict[str, Any] = {**norm._parameters, "weight": scale - _scale_offset(norm)}
    if "bias" in own:
        own["bias"] = b
    twin.__dict__ = {**norm.__dict__, "_parameters": own}
    y = cast(Any, cls).forward(twin, x)
    return y if b is None or "bias" in own else y + along(b, y, channel_axis(norm))


def mix(module: nn.Module, h: Tensor, B: Tensor) -> Tensor:
    """B (O, R) on the channels of `h`: the last dimension, or dimension 1 behind a convolution
    (R/groups columns there).
    """
    if isinstance(module, _ConvNd):
        ones = (1,) * len(module.kernel_size)
        return _CONVOLVE[len(ones)](h, B.view(*B.shape, *ones), groups=module.groups)
    return F.linear(h, B)
