"""Delta: a paper's equation as a module, y = f(x; layer). Parameters and buffers of methods live
here and nowhere else.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from peftcli.core.layer import Layer


class NotMergeable(TypeError):  # noqa: N818 - a property of the equation
    """The equation does not fold into a weight and a bias."""


class Delta(nn.Module):
    """y = f(x; layer). `hf_keys` names its tensors in Hugging Face peft's files, where peft has the
    method.
    """

    hf_keys: ClassVar[dict[str, str]] = {}
    takes_positions: int = 0  # of a row, for tokens of its own

    def forward(self, x: Any, layer: Layer) -> Any:
        """The site's output for the input `x`; at the model site `x` is the batch, a dict by
        argument name.
        """
        raise NotImplementedError

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight (O, I) and bias (O,) of the one layer that equals this delta on a layer with
        `W` and `b`.
        """
        raise NotMergeable(f"{type(self).__name__} does not fold into a weight")


class WeightDelta(Delta):
    """W' = W + delta(W)."""

    def delta(self, W: Tensor) -> Tensor:
        """The change (O, I) of the weight `W` (O, I)."""
        raise NotImplementedError

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + delta(W), the sum in the delta's precision."""
        dW = self.delta(W)
        return W.to(dW.dtype) + dW, b

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """The layer's product with the changed weight; a method may have a cheaper way."""
        W, b = self.merged(layer.weight, layer.bias)
        return layer.linear(x, W.to(x.dtype) if x.is_floating_point() else W, b)


class OutputDelta(Delta):
    """y' = edit(y, x)."""

    def edit(self, y: Tensor, x: Tensor) -> Tensor:
        """The new output, from the layer's output `y` and input `x`."""
        raise NotImplementedError

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """edit(layer(x), x)."""
        return self.edit(layer(x), x)


class InputDelta(Delta):
    """x' = edit(x)."""

    def edit(self, x: Any) -> Any:
        """The new input."""
        raise NotImplementedError

    def forward(self, x: Any, layer: Layer) -> Any:
        """layer(edit(x))."""
        return layer(self.edit(x))
