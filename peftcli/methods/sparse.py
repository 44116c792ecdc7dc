"""What sparse methods share: a change of few entries of a weight, kept as positions and values.

    W'.flat[indices] = W.flat[indices] + values        W (O, I) frozen, indices (K,), values (K,)

Memory for training is that of K numbers, and the change folds into W afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.delta import WeightDelta
from peftcli.core.graft import is_own
from peftcli.core.layer import Layer
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.kernels.sparse_linear import Watch, add_entries, sparse_linear, spread

if TYPE_CHECKING:
    from peftcli.core.host import Host


class SparseDelta(WeightDelta):
    """W' = W with `values` added at the flat, row-major positions `indices`, which all differ.

    `watch`, where a method sets it, is shown the gradient (O, I) of the dense W' in every backward
    pass, so that other positions can be chosen by it.
    """

    indices: Tensor

    def __init__(self, site: Site, indices: Tensor) -> None:
        super().__init__()
        self.shape, self.is_linear = (site.d_out, site.d_in), site.kind == "linear"
        fits = site.d_out * site.d_in < 2**31
        self.register_buffer("indices", indices.to(torch.int32 if fits else torch.int64))  # (K,)
        self.values = nn.Parameter(
            torch.zeros(indices.shape, device=indices.device)
        )  # (K,), zero so W' = W at start
        self.watch: Watch | None = None

    def delta(self, W: Tensor) -> Tensor:
        """The values on a matrix (O, I) of zeros."""
        return spread(self.indices, self.values, self.shape)

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W' in the values' precision."""
        return add_entries(W.to(self.values.dtype), self.indices, self.values), b

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """W' x + b in one product for a plain linear layer; else the layer's output and a sparse
        product beside it (so that a weight in 4 bits need not be shown).
        """
        if layer.is_plain:
            W, b = layer.weight, layer.bias
            return sparse_linear(x, self.indices, self.values, self.shape[0], W, b, self.watch)
        y = layer(x)
        if self.is_linear:
            x = x.to(y.dtype)
            return y + sparse_linear(
                x, self.indices, self.values, self.shape[0], watch=self.watch
            ).to(y.dtype)
        dW = spread(self.indices, self.values, self.shape)
        if self.watch is not None:
            dW.register_hook(self.watch)
        return y + layer.linear(x, dW.to(y.dtype))


class Masks(nn.Module):
    """Which numbers of each parameter train; `names` are those of the parameters."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = tuple(masks)
        for name, mask in masks.items():
            self.register_buffer(name.replace(".", "/"), mask)  # bool, of the parameter's shape

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(name.replace(".", "/"))


def random_positions(site: Site, k: int) -> Tensor:
    """`k` of the site's flat positions, all subsets alike likely, in ascending order."""
    noise = torch.rand(site.d_out * site.d_in, device=site.device)
    return noise.topk(k).indices.sort().values


def size_of_base(host: Host) -> int:
    """Weights of the model without adapters."""
    sizes = weights.sizes(host.model)
    return sum(sizes[p] for n, p in host.model.named_parameters() if not is_own(n))


def budget_of(
    host: Host,
    sizes: Sequence[int],
    key: str,
    number: int | None,
    density: float,
    targets: str = "method.target_modules",
) -> int:
    """How many weights may train on targets of these sizes: the `number` of `method.<key>`, else a
    share of the whole model. Raises `ConfigError`, which names the `targets`, where they have
    fewer.
    """
    budget = number or int(density * size_of_base(host))
    if budget > sum(sizes):
        raise ConfigError(
            f"{targets} has {sum(sizes)} weights, fewer than the {budget} of "
            f"method.{key} or method.density (a share of the whole model)."
        )
    return budget
