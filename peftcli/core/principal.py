"""What the inputs of layers are like, over a few batches: their main directions, and their Gram
matrices; leading singular vectors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftcli.core.scores import Calibration, each_input
from peftcli.core.site import Site

if TYPE_CHECKING:
    from peftcli.core.host import Host


def leading(M: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, k), S (k,), V' (k, I) of the `k` largest singular values of `M` (O, I): exact where
    they are a good part of all, else by four power iterations on 4k columns.
    """
    if 4 * k >= min(M.shape):
        U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(M, q=4 * k, niter=4)
        Vh = V.T
    return U[:, :k], S[:k], Vh[:k]


class PrincipalInputs:
    """Incremental PCA: the `k` main directions of a stream of vectors (I,) about their mean, in the
    memory of one batch.

    `components` (k, I) are orthonormal rows with singular values `S` (k,); `ratios` is S^2 over the
    total squared deviation; `similarity` the absolute cosine of each component with itself before
    the last update, 0 at first.
    """

    def __init__(self, k: int) -> None:
        self.k, self.seen, self.deviation = k, 0, 0.0
        self.components = self.S = self.ratios = self.similarity = self.mean = torch.empty(0)
        self.waiting: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Hold the rows of `x` (N, I) for the next `update`."""
        self.waiting.append(x.float())

    def update(self) -> None:
        """Take in the rows that wait, once there are k."""
        if sum(map(len, self.waiting)) < self.k:
            return
        x, self.waiting = torch.cat(self.waiting), []
        n, m, mean = self.seen, len(x), x.mean(0)
        centred, old = x - mean, self.components
        self.deviation += centred.square().sum().item()
        rows = [centred]
        if n:
            shift = math.sqrt(n * m / (n + m)) * (self.mean - mean)
            self.deviation += shift.square().sum().item()
            rows = [self.S[:, None] * old, centred, shift[None]]
            mean = (n * self.mean + m * mean) / (n + m)
        _, self.S, self.components = leading(torch.cat(rows), self.k)
        self.seen, self.mean = n + m, mean
        self.ratios = self.S.square() / self.deviation
        self.similarity = (self.components * old).sum(1).abs() if n else torch.zeros_like(self.S)


def principal_inputs(
    host: Host,
    sites: Sequence[Site],
    data: Calibration,
    n: int,
    counts: Mapping[str, int],
    converged: Callable[[Mapping[str, PrincipalInputs]], bool],
) -> dict[str, PrincipalInputs]:
    """The main directions of every site's inputs, `counts` by site, over at most `n` batches or
    until they have `converged`. Sites that see the same tensor (q, k, v) share one; padding and
    tokens without a target are left out.
    """
    found: dict[str, PrincipalInputs] = {}
    leads: set[str] = set()
    first: list[tuple[Tensor, PrincipalInputs]] = []  # inputs of the first batch, kept alive

    def take(site: Site, x: Tensor, batch: Any) -> None:
        if site.name not in found:
            shared = next((p for other, p in first if _is_same(x, other)), None)
            if shared is None:
                shared = PrincipalInputs(0)
                leads.add(site.name)
                first.append((x, shared))
            shared.k = max(shared.k, counts[site.name])
            found[site.name] = shared
        if site.name in leads:
            counted = data.tokens(batch, source=_reads_source(host, site))
            found[site.name].add(_rows(x, counted))

    def after() -> bool:
        first.clear()
        for name in leads:
            found[name].update()
        return converged(found)

    each_input(host.model, sites, data, n, take, after)
    return found


def input_grams(host: Host, sites: Sequence[Site], data: Calibration, n: int) -> dict[str, Tensor]:
    """sum x x' (I, I) in float64 of every site's inputs over `n` batches, by name; sites that see
    the same tensor (q, k, v) share one. Padding is left out.
    """
    grams: dict[str, Tensor] = {}
    seen: list[tuple[Tensor, Tensor]] = []  # this batch's inputs, kept alive, each with its matrix
    now: list[Any] = []

    def add(site: Site, x: Tensor, batch: Any) -> None:
        if not now or now[0] is not batch:
            now[:] = [batch]
            seen.clear()
        shared = next((G for other, G in seen if _is_same(x, other)), None)
        if shared is None:
            rows = _rows(x, data.tokens(batch, source=True)).double()
            shared = grams.setdefault(site.name, rows.new_zeros(site.d_in, site.d_in))
            seen.append((x, shared.add_(rows.T @ rows)))
        grams[site.name] = shared

    each_input(host.model, sites, data, n, add)
    return grams


def _is_same(x: Tensor, other: Tensor) -> bool:
    """Whether both are one tensor, or aliases of one."""
    return x.data_ptr() == other.data_ptr() and x.shape == other.shape


def _rows(x: Tensor, counted: Tensor | None) -> Tensor:
    """The vectors (N, I) of `x` (..., I) at the tokens that count, where `x` has tokens."""
    if counted is not None and x.shape[:-1] == counted.shape:
        return x[counted]
    return x.flatten(0, -2)


_CROSS = re.compile(r"(EncDecAttention|encoder_attn|cross_?attn|crossattention)\.")


def _reads_source(host: Host, site: Site) -> bool:
    """Whether the site's input comes from an encoder-decoder's encoder."""
    is_cross = _CROSS.search(site.path) and site.role in ("k", "v")
    return host.layout.tower_of(site.path) == "encoder" or bool(is_cross)
