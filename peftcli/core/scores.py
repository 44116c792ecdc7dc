"""Looking at the task before training: gradients of frozen weights and inputs of layers, over a few
batches.

A score is consumed one weight at a time: the gradient of a frozen weight exists only while its
layer's backward runs, so a quantised or a large model is scored in the memory of one weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from peftcli.core.delta import Delta
from peftcli.core.graft import graft, prune
from peftcli.core.layer import Layer
from peftcli.core.site import Site

if TYPE_CHECKING:
    pass

PROBE = "__probe__"  # name of the passing adapter that watches a site


class Calibration(Protocol):
    """What a method may look at before it starts: the first batches of the run's own training
    order, its tokenizer (None for images) and the names of its classes, if it has any.
    """

    @property
    def tokenizer(self) -> Any:
        """Of the run; None for images."""
        ...

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, none where the task has no classes."""
        ...

    def batches(self, n: int) -> Iterator[Any]:
        """The first `n` micro-batches; fewer where the data end."""
        ...

    def forward(self, batch: Any) -> None:
        """Run the model over the batch, without gradients."""
        ...

    def loss(self, batch: Any) -> Tensor:
        """The mean loss over the batch's targets."""
        ...

    def tokens(self, batch: Any, source: bool = False) -> Tensor | None:
        """(B, T), which tokens count: those that answer for a target, or all real ones where no
        token is a target or the `source` of an encoder-decoder is meant; None means all.
        """
        ...


def each_gradient(
    model: nn.Module,
    sites: Sequence[Site],
    data: Calibration,
    n: int,
    consume: Callable[[Site, Tensor], None],
) -> int:
    """Call `consume(site, G)` with dL/dW (d_out, d_in) of every site for each of the first `n`
    batches; returns how many there were. Weights stay frozen and unchanged.
    """
    count = 0
    model.eval()
    with _probes(sites, lambda site: _GradientProbe(site, consume)):
        for batch in data.batches(n):
            data.loss(batch).backward()
            count += 1
    for parameter in model.parameters():
        parameter.grad = None
    return count


def mean_gradients(
    model: nn.Module, sites: Sequence[Site], data: Calibration, n: int
) -> dict[str, Tensor]:
    """The gradients (d_out, d_in) of the sites' weights over `n` batches, averaged, by name."""
    sums: dict[str, Tensor] = {}

    def add(site: Site, G: Tensor) -> None:
        held = sums.setdefault(site.name, torch.zeros_like(G, dtype=torch.float32))
        held += G

    count = each_gradient(model, sites, data, n, add)
    return {name: G / max(count, 1) for name, G in sums.items()}


@torch.no_grad()
def each_input(
    model: nn.Module,
    sites: Sequence[Site],
    data: Calibration,
    n: int,
    consume: Callable[[Site, Tensor, Any], bool | None],
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Call `consume(site, x, batch)` with the input of every site for each of the first `n`
    batches, until it returns True for all of them, or `stop()` is true after a batch; returns how
    many batches were seen.
    """
    now: list[Any] = [None]
    done: set[str] = set()

    def see(site: Site, x: Tensor) -> None:
        if site.name not in done and consume(site, x, now[0]):
            done.add(site.name)

    count = 0
    model.eval()
    with _probes(sites, lambda site: _InputProbe(site, see)):
        for batch in data.batches(n):
            now[0] = batch
            data.forward(batch)
            count += 1
            if stop() or len(done) == len({s.name for s in sites}):
                break
    return count


@contextmanager
def _probes(sites: Sequence[Site], make: Callable[[Site], Delta]) -> Iterator[None]:
    """A probe on every module of `sites`; the roles of a fused linear share one."""
    by_module: dict[str, list[Site]] = {}
    for site in sites:
        by_module.setdefault(site.path, []).append(site)
    for held in by_module.values():
        graft(held[0].module, PROBE, _Together([make(site) for site in held]))
    try:
        yield
    finally:
        for held in by_module.values():
            prune(held[0].module, PROBE)


class _Together(Delta):
    """Several probes on one module."""

    def __init__(self, probes: list[Any]) -> None:
        super().__init__()
        self.probes = probes

    def forward(self, x: Any, layer: Layer) -> Any:
        return self.probes[0].watch(self.probes, x, layer)


class _InputProbe(Delta):
    def __init__(self, site: Site, see: Callable[[Site, Tensor], None]) -> None:
        super().__init__()
        self.site, self.see = site, see

    def watch(self, probes: list[Any], x: Tensor, layer: Layer) -> Any:
        for probe in probes:
            probe.see(probe.site, x)
        return layer(x)


class _GradientProbe(Delta):
    def __init__(self, site: Site, consume: Callable[[Site, Tensor], None]) -> None:
        super().__init__()
        self.site, self.consume = site, consume

    def watch(self, probes: list[Any], x: Tensor, layer: Layer) -> Tensor:
        W = layer.weight.detach().requires_grad_()

        def take(leaf: Tensor) -> None:
            assert leaf.grad is not None
            for probe in probes:
                rows = probe.site.rows
                G = leaf.grad
                whole = G if rows is None else torch.cat([G[a:b] for a, b in rows])
                probe.consume(probe.site, whole)
            leaf.grad = None

        W.register_post_accumulate_grad_hook(take)
        return layer.linear(x, W.to(x.dtype) if x.is_floating_point() else W, layer.bias)
