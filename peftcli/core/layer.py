"""What an equation sees at a site: `Layer`, a callable with a weight. A Delta bound to a Layer is a
Layer again (`Bound`), so stacking, combining and merging are function composition with the bare
module as identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.kernels.precision import product_dtype

if TYPE_CHECKING:
    from peftcli.core.delta import Delta


class Layer(Protocol):
    """layer(x) -> y; layer.weight (O, I) dense; layer.bias; layer.linear(x, W, b) and layer.mix(h,
    B), the module's own kind of product with other matrices; layer.dtype, that of the last output.
    """

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the bare module's last output."""
        ...

    @property
    def is_plain(self) -> bool:
        """y = W x + b with a frozen dense W, so that a fused operation may stand in for it."""
        ...

    def __call__(self, x: Any) -> Any:
        """The layer's output for `x`."""
        ...

    @property
    def module(self) -> nn.Module:
        """The module at the bottom."""
        ...

    @property
    def weight(self) -> Tensor:
        """(O, I), dense."""
        ...

    @property
    def bias(self) -> Tensor | None:
        """(O,) or None."""
        ...

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        """The module's product with `W` (R, I) in place of its weight."""
        ...

    def mix(self, h: Tensor, B: Tensor) -> Tensor:
        """`B` (O, R) applied to the channels of `h`."""
        ...


class Bare:
    """The module as it was before grafting. `rest` carries its other arguments in and its other
    outputs out.
    """

    __slots__ = ("args", "cls", "dtype", "key", "kwargs", "module", "rest")

    def __init__(
        self,
        module: nn.Module,
        cls: type[nn.Module],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        key: str | None = None,
    ) -> None:
        self.module, self.cls, self.args, self.kwargs, self.key = (
            module,
            cls,
            args,
            kwargs or {},
            key,
        )
        self.rest: tuple[Any, ...] | None = None
        self.dtype: torch.dtype | None = None

    def __call__(self, x: Any) -> Any:
        """The bare output for `x`."""
        if isinstance(x, dict):  # the model site: x is the batch, by argument name
            return self.cls.forward(self.module, **x)
        if self.key is None:
            out = self.cls.forward(self.module, x, *self.args, **self.kwargs)
        else:
            out = self.cls.forward(self.module, *self.args, **{**self.kwargs, self.key: x})
        if isinstance(out, tuple):
            self.rest = out[1:]
            out = out[0]
        self.dtype = out.dtype if isinstance(out, Tensor) else None
        return out

    @property
    def is_plain(self) -> bool:
        """Whether the module is just W x + b with a frozen dense weight."""
        return weights.is_plain(self.module, self.cls)

    @property
    def weight(self) -> Tensor:
        """The dense (O, I) weight."""
        return weights.dense(self.module)

    @property
    def bias(self) -> Tensor | None:
        """The bias (O,), or None."""
        return getattr(self.module, "bias", None)

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        """The module's product with `W` (R, I) in place of its weight."""
        return weights.apply(self.module, x, W, b)

    def mix(self, h: Tensor, B: Tensor) -> Tensor:
        """`B` (O, R) applied to the channels of `h`."""
        return weights.mix(self.module, h, B)


class Bound:
    """A delta on a layer. Calls the delta as a module, so that hooks of sharding engines stay
    alive.
    """

    __slots__ = ("delta", "inner")
    is_plain = False

    def __init__(self, delta: Delta, inner: Layer) -> None:
        self.delta, self.inner = delta, inner

    def __call__(self, x: Any) -> Any:
        """The delta's output, in the type of the layer's own."""
        y = self.delta(x, self.inner)
        if not isinstance(y, Tensor):
            return y
        want = (
            self.inner.dtype
        )  # of the layer's own output; a delta that never asked for it keeps to its input
        if want is None and isinstance(x, Tensor) and x.is_floating_point():
            want = product_dtype(x)
        return y if want is None else y.to(want)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the bare module's last output."""
        return self.inner.dtype

    @property
    def module(self) -> nn.Module:
        """The module at the bottom."""
        return self.inner.module

    @property
    def weight(self) -> Tensor:
        """The folded weight (O, I)."""
        return self.delta.merged(self.inner.weight, self.inner.bias)[0]

    @property
    def bias(self) -> Tensor | None:
        """The folded bias (O,), or None."""
        return self.delta.merged(self.inner.weight, self.inner.bias)[1]

    def linear(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        """The module's product with `W` (R, I) in place of its weight."""
        return self.inner.linear(x, W, b)

    def mix(self, h: Tensor, B: Tensor) -> Tensor:
        """`B` (O, R) applied to the channels of `h`."""
        return self.inner.mix(h, B)
