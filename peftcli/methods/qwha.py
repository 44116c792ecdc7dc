"""QWHA: sparse Walsh-Hadamard coefficients that start by cancelling the quantisation error.

"QWHA: Quantization-Aware Walsh-Hadamard Adaptation for Parameter-Efficient Fine-Tuning on Large
Language Models", Jeon, Lee et al., ICLR 2026, arXiv 2509.17428.

    y = W_q x + b + dW x        dW = (c / sqrt(O)) F H^-1
    F (O, I) zero but for v (n,) at fixed positions, H (I, I) a Hadamard matrix, H^-1 = H' / I

A sparse F with one cheap transform makes a dW of nearly full rank, which errors of low-bit weights
are. The start is taken from the error dE = W - W_q and the Gram matrix G of the layer's inputs:

    budget     n_i coefficients for output i, in proportion to |X_i|^a, X = dE H   (AdaAlloc)
    positions  the n_i largest |R H_j / I|^2 X_ij^2, R' R = G
    values     v_i = argmin |R (dE_i - dW_i)'|, by the normal equations

Where we depart from the official code: budgets are clipped and spread until they fit; biases are
kept; the inputs are those of the run's own training data in the model as it is corrected so far,
not of a test split of wikitext in the original one; c may differ between start and training, since
v is stored for the c that trains. Bases are of bitsandbytes' 4 or 8 bits, where the paper makes its
own of 2 to 4 by GPTQ. A layer that is not quantised, or an adapter that is read from a file, starts
plain: zeros at random positions. A layer of fewer than n entries trains all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from peftcli.core import weights
from peftcli.core.principal import input_grams
from peftcli.core.site import Site
from peftcli.errors import ConfigError, NotApplicable
from peftcli.kernels.hadamard import factors, hadamard, odd_order
from peftcli.kernels.hadamard_linear import Factors, Sparse, hadamard_linear
from peftcli.kernels.sparse_linear import spread
from peftcli.methods.spectral import SpectralDelta, SpectralMethod, random_positions

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class QWHADelta(SpectralDelta):
    """dW = (c / sqrt(O)) F H^-1   (Jeon, Lee et al. 2026)."""

    def __init__(self, site: Site, positions: Tensor, c: float) -> None:
        super().__init__(site, positions, persistent=True)  # the data choose them
        self.scale = c / site.d_out**0.5
        left, right = factors(site.d_in)
        self.left: Tensor  # of H: (P, P) and (Q, Q), PQ = I
        self.right: Tensor
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def hadamard(self, x: Tensor, inverse: bool = False) -> Tensor:
        """x H or x H^-1 for rows x (..., I)."""
        return hadamard(x, self.left, self.right, inverse)

    def delta(self, W: Tensor) -> Tensor:
        """(c / sqrt(O)) F H^-1."""
        F = spread(self.positions, self.coefficients, self.shape)
        return self.scale * self.hadamard(F, inverse=True)

    def product(self, x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        """(W + dW) x + b."""
        F = Sparse(self.coefficients, self.positions, self.shape[0])
        return hadamard_linear(x, W, b, F, Factors(self.left, self.right), self.scale)

    @torch.no_grad()
    def start(self, dE: Tensor, G: Tensor, alloc_power: float, damp: float) -> None:
        """Cancel the error dE (O, I) of a layer whose inputs have the Gram matrix G (I, I)."""
        d_out, d_in = self.shape
        G = G + damp * G.diagonal().mean() * torch.eye(d_in, dtype=G.dtype, device=G.device)
        GH = self.hadamard(G)  # G H, as H transforms rows
        gram = self.hadamard(GH.T) / d_in**2  # H' G H / I^2, of the bases R H / I
        X = self.hadamard(dE.to(G))  # (O, I)
        target = self.hadamard(dE.to(G) @ G) / d_in  # dE G H / I
        counts = allocate(X.norm(dim=1) ** alloc_power, self.coefficients.numel(), d_in)
        order = (gram.diagonal() * X.square()).argsort(dim=1, descending=True)  # (O, I)
        chosen = torch.arange(d_in, device=X.device) < counts[:, None]  # of `order`
        values = fit(gram, target, order, counts)
        rows = torch.arange(d_out, device=X.device)[:, None]
        self.positions.copy_((rows * d_in + order)[chosen])
        self.coefficients.copy_(values[chosen] / self.scale)


def allocate(importance: Tensor, n: int, most: int) -> Tensor:
    """How many of n coefficients each channel (O,) gets, at most `most`: in proportion, what
    rounding and clipping left spread evenly, the last few to the channels that have fewest.
    """
    share = importance.double().clamp(min=1e-300)
    counts = (n * share / share.sum()).floor().long().clamp(max=most)
    while left := min(n, most * len(counts)) - int(counts.sum()):
        is_open = counts < most
        if each := left // int(is_open.sum()):
            counts = (counts + each * is_open).clamp(max=most)
        else:
            fewest = counts.masked_fill(~is_open, most + 1).argsort(stable=True)[:left]
            counts[fewest] += 1
    return counts


def fit(gram: Tensor, target: Tensor, order: Tensor, counts: Tensor, at_once: int = 64) -> Tensor:
    """Least squares of every channel on its first `counts` (O,) bases in `order` (O, I): the values
    (O, I) in that order, zero behind. gram (I, I), target (O, I).

    Channels of similar counts are solved together, padded by the identity.
    """
    values = torch.zeros_like(target)
    for rows in counts.argsort().split(at_once):
        most = int(counts[rows].max())
        S = order[rows, :most]  # (N, K)
        kept = torch.arange(most, device=S.device) < counts[rows, None]
        both = kept[:, :, None] & kept[:, None, :]
        eye = torch.eye(most, dtype=gram.dtype, device=gram.device)
        A = torch.where(both, gram[S[:, :, None], S[:, None, :]], eye)
        right = target[rows].gather(1, S) * kept
        values[rows, :most] = torch.linalg.solve(A, right[..., None])[..., 0]
    return values


@dataclass(frozen=True)
class QWHA(SpectralMethod):
    """Sparse Walsh-Hadamard coefficients on a quantised base."""

    family: ClassVar[str] = "sparse"
    size_option: ClassVar[str | None] = "r_eq"

    r_eq: Annotated[int, Ge(1)] = 64
    n: Annotated[int, Ge(1)] | None = None
    scaling: Annotated[float, Gt(0)] = 4000.0
    init: Literal["qwha", "plain"] = "qwha"
    alloc_power: Annotated[float, Ge(0)] = 1.0
    damp: Annotated[float, Gt(0)] = 1e-4
    calibration_batches: Annotated[int, Ge(1)] = 16
    seed: Annotated[int, Ge(0)] = 777
    target_modules: str | tuple[str, ...] = "all-linear"

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Graft zeros block by block; where `data` and the weights before rounding are at hand, the
        next block's inputs are those behind the errors that are cancelled already.
        """
        sites = host.find(self.target_modules)
        for site in sites:
            _check_order(host, site)
        for _, of_block in groupby(sites, key=lambda site: site.layer):
            block = list(of_block)
            rounded = [s for s in block if weights.is_quantised(s.module)]
            grams: dict[str, Tensor] = {}
            if self.init == "qwha" and data is not None and rounded:
                grams = input_grams(host, rounded, data, self.calibration_batches)
            for site in block:
                delta = self.build(site)
                if site.name in grams:
                    dE = _original(host, site) - site.weight.float()
                    start = grams[site.name].float()
                    delta.to(site.device).start(dE, start, self.alloc_power, self.damp)
                host.graft(site, delta)

    def build(self, site: Site) -> QWHADelta:
        """Zeros at the seed's positions."""
        positions = random_positions(site.d_out * site.d_in, self.budget(site), self.seed)
        return QWHADelta(site, positions, self.scaling)

    def budget(self, site: Site) -> int:
        """n, as many as a LoRA of rank r_eq has, and at most all entries."""
        return min(self.n or self.r_eq * (site.d_in + site.d_out), site.d_out * site.d_in)


def _check_order(host: Host, site: Site) -> None:
    try:
        odd_order(site.d_in)
    except ValueError as e:
        raise NotApplicable(
            f"{type(host.model).__name__}: {e}, the width of {site.path}; leave it out of "
            "method.target_modules, or take method=fourierft, which has no such limit."
        ) from None


def _original(host: Host, site: Site) -> Tensor:
    """The weight (d_out, d_in) before it was rounded."""
    W = host.original_weight(site)
    if W is None:
        raise ConfigError(
            f"method.init=qwha needs the weight that {site.path} was rounded from, and the model's "
            "folder does not hold it. Take a model that is quantised while it is loaded, or "
            "method.init=plain."
        )
    return W
