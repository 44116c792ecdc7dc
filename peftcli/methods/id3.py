"""ID3: Step-by-Step Unmasking for Parameter-Efficient Fine-tuning of Large Language Models.
Agarwal, Ramesh, Sengupta, Chakraborty, TACL 2025, arXiv 2408.14470.

    W'.flat[p_k] = W.flat[p_k] + v_k        p, v (K,) over all targets; K grows from 0 to B
    H = |g| / (|w| + eps)^exp               of every entry w that still rests, with its gradient g
    H = -|w|                                with criterion=magnitude: the smallest first

A budget of B scalars is spent evenly: each of T steps unmasks for good the B / T resting entries of
the largest H over all targets. So positions are chosen while training shows what matters, and about
half the updates of a fixed mask are made.

The values are one vector that the run's optimizer sees from the first step: its clock is one for
all entries, as that of a dense masked Adam, and so is an update. Departures from the official code:
the number of entries is exact, nothing is masked again, ties go by target, then by flat index; the
candidates are the weights of `target_modules`, never biases and norms; gradients are clipped by the
norm of the unmasked, there by that of all (the order of H is the same); values are changes of W,
rounded once, there W itself. Of its other modes the fixed mask of the first step's gradients is
`max_steps=1`; PaFi, the smallest weights from the first step on, is that with
`criterion=magnitude`; BitFit is a method of its own. A budget drawn anew at every step is left out:
what it trains is no sparse change. Fisher information, g^2, orders entries as `exp=0` does.

`over` spends the budget on the parameters of another method instead (the code's ID3-LoRA): they are
unmasked step by step (`unmasking.py`), and what is published is an adapter of that method.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, cast

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peftcli.core.delta import WeightDelta
from peftcli.core.method import Method, Step
from peftcli.core.site import Site
from peftcli.errors import ConfigError, NotApplicable
from peftcli.kernels.sparse_linear import Watch
from peftcli.methods.sparse import budget_of
from peftcli.methods.unmasking import first_largest, mask_parameters, masks_of, method_over, unmask

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class Budget(nn.Module):
    """B values at different positions in the targets' weights laid end to end. The first `spent`
    train; the others wait, with value 0, at positions that mean nothing.
    """

    positions: Tensor
    spent: Tensor
    step: Tensor

    def __init__(self, B: int, num_weights: int, device: torch.device) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(B, device=device))  # (B,), zero so W' = W at start
        positions = torch.arange(B, device=device) * num_weights // B
        self.register_buffer("positions", positions)  # (B,)
        self.register_buffer("spent", torch.tensor(0, device=device))
        self.register_buffer("step", torch.tensor(0, device=device))  # steps taken: s

    def spend(self, chosen: Tensor) -> None:
        """Unmask the positions `chosen` (N,)."""
        spent = int(self.spent)
        waiting = self.positions[spent:]
        others = waiting[~torch.isin(waiting, chosen)]
        self.positions[spent:] = torch.cat([chosen, others])[: len(waiting)]
        self.spent += len(chosen)


class ID3Delta(WeightDelta):
    """W' = W with those values of the budget that lie in this weight, which begins at `start`.

    `grad_W` sums the dense gradient (O, I) of W' over the micro-batches of a step, while it is
    wanted.
    """

    def __init__(self, site: Site, budget: Budget, start: int) -> None:
        super().__init__()
        self.shape, self.start = (site.d_out, site.d_in), start
        self.budget = (budget,)  # in a tuple, so that it is saved once
        self.is_watching, self.grad_W = False, cast(Tensor | None, None)

    def delta(self, W: Tensor) -> Tensor:
        """The values on a matrix (O, I) of zeros."""
        (budget,) = self.budget
        watch = self._watch if self.is_watching else None
        return _Spread.apply(budget.values, budget.positions, self.start, self.shape, watch)

    def _watch(self, grad_W: Tensor) -> None:
        self.grad_W = grad_W if self.grad_W is None else self.grad_W + grad_W

    def take_gradient(self) -> Tensor:
        """The step's dense gradient, flat (O I,), which is forgotten; 0 where the weight had no
        part in the loss.
        """
        (budget,) = self.budget
        grad_W, self.grad_W, self.is_watching = self.grad_W, None, False
        size = math.prod(self.shape)
        return budget.values.new_zeros(size) if grad_W is None else grad_W.flatten()


class _Spread(torch.autograd.Function):
    """The values that lie in one weight on a matrix of zeros; saves nothing but what is shared."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        positions: Tensor,
        start: int,
        shape: tuple[int, int],
        watch: Watch | None,
    ) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.start, ctx.watch = start, watch
        padded = values.new_zeros(math.prod(shape) + 1)  # what lies elsewhere goes to the end
        padded[_places(positions, start, math.prod(shape))] = values
        return padded[:-1].view(shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator hides names
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad_W,) = grad_outputs
        (positions,) = ctx.saved_tensors
        if ctx.watch is not None:
            ctx.watch(grad_W)
        padded = torch.cat([grad_W.flatten(), grad_W.new_zeros(1)])
        return padded[_places(positions, ctx.start, grad_W.numel())], None, None, None, None


def _places(positions: Tensor, start: int, size: int) -> Tensor:
    """Flat positions in the weight of `size` entries that begins at `start`; `size` for others."""
    places = positions - start
    return torch.where((places >= 0) & (places < size), places, size)


@dataclass(frozen=True)
class ID3(Method):
    """Sparse fine-tuning whose entries are unmasked step by step."""

    family: ClassVar[str] = "selective"

    budget: Annotated[int, Ge(1)] | None = None
    density: Annotated[float, Gt(0), Le(1)] = 0.0017
    criterion: Literal["gradient", "magnitude"] = "gradient"
    exp: Annotated[float, Ge(0)] = 0.0
    eps: Annotated[float, Gt(0)] = 1e-3
    max_steps: Annotated[int, Ge(1)] | None = None
    target_modules: str | tuple[str, ...] = "all-linear"
    over: str = ""
    over_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what `over` cannot be, before anything is loaded."""
        if self.over_options and not self.over:
            raise ConfigError("method.over_options are of the method that method.over names.")
        if self.over:
            assert self.inner

    @cached_property
    def inner(self) -> Method:
        """The method whose parameters are unmasked."""
        return method_over(self.over, self.over_options)

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Lay the targets' weights end to end; nothing is unmasked yet."""
        if self.over:
            self.inner.setup(host, data)
            host.adapters[host.building] = self.inner
            mask_parameters(host, self.budget, self.density)
            return
        sites = host.find(self.target_modules)
        sizes = [site.d_out * site.d_in for site in sites]
        B = budget_of(host, sizes, "budget", self.budget, self.density)
        if not B:
            raise NotApplicable(
                f"method.density={self.density} of {type(host.model).__name__} is less than one "
                "weight; raise it, or name a number in method.budget."
            )
        budget = Budget(B, sum(sizes), sites[0].device)
        host.share(budget)
        for i, site in enumerate(sites):
            host.graft(site, ID3Delta(site, budget, sum(sizes[:i])))

    def num_unmasked(self, B: int, step: int, total: int) -> int:
        """n_s: how many entries optimizer step `step` of `total` unmasks; the first B mod T steps
        take one more than the others.
        """
        T = self.max_steps or total
        return B // T + (step < B % T) if step < T else 0

    def param_groups(self, host: Host, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Those of the method that is unmasked; only modules that train whole decay."""
        if not self.over:
            return super().param_groups(host, lr, weight_decay)
        masks = masks_of(host, self.inner)
        mine, split = {host.model.get_parameter(name) for name in masks.names}, []
        for group in self.inner.param_groups(host, lr, weight_decay):
            masked = [p for p in group["params"] if p in mine]
            rest = [p for p in group["params"] if p not in mine]
            split += [{**group, "params": masked, "weight_decay": 0.0}, {**group, "params": rest}]
        return [group for group in split if group["params"]]

    def penalty(self, host: Host) -> Tensor | None:
        """That of the method that is unmasked."""
        return self.inner.penalty(host) if self.over else None

    def before_step(self, host: Host, t: Step) -> None:
        """Watch dense gradients where entries will be chosen, from this step on alone."""
        if self.over:
            self.inner.before_step(host, t)
            return
        budget, sites = self._parts(host)
        wanted = self.num_unmasked(len(budget.values), int(budget.step), t.total) > 0
        for _, delta in sites:
            delta.is_watching, delta.grad_W = wanted, None

    def after_backward(self, host: Host, t: Step) -> None:
        """Unmask, then drop the gradients of what waits. Where a gradient is not finite all become
        so, and the loop takes no step.
        """
        if self.over:
            masks = masks_of(host, self.inner)
            n = self.num_unmasked(masks.B, int(masks.step), t.total)
            unmask(host, masks, n, self.score)
            self.inner.after_backward(host, t)
            return
        budget, sites = self._parts(host)
        B, first = len(budget.values), int(budget.spent)
        n = min(self.num_unmasked(B, int(budget.step), t.total), B - first)
        grads = [delta.take_gradient() for _, delta in sites] if n else []
        host.ranks.sum_(grads)
        grad = budget.values.grad
        assert grad is not None, "no target had a part in the loss"
        if not all(g.isfinite().all() for g in (grad, *grads)):
            grad.fill_(torch.nan)
            return
        if n:
            chosen, grad[first : first + n] = self._choose(budget, sites, grads, n)
            budget.spend(chosen)
        grad[first + n :] = 0.0
        budget.step += 1

    def _choose(
        self, budget: Budget, sites: list[tuple[Site, ID3Delta]], grads: list[Tensor], n: int
    ) -> tuple[Tensor, Tensor]:
        """Positions (N,) and gradients (N,) of the `n` best entries over all targets: those of each
        target, then of them all.
        """
        taken = budget.positions[: int(budget.spent)]
        found: list[tuple[Tensor, ...]] = []
        for (site, delta), g in zip(sites, grads, strict=True):
            H = self.score(g, lambda site=site: site.weight.flatten())
            inside = (taken >= delta.start) & (taken < delta.start + len(H))
            H[taken[inside] - delta.start] = -math.inf  # below every score
            best = first_largest(H, min(n, len(H)))
            found.append((H[best], best + delta.start, g[best]))
        H, positions, g = (torch.cat(parts) for parts in zip(*found, strict=True))
        best = first_largest(H, n)
        return positions[best], g[best]

    def after_step(self, host: Host, t: Step) -> None:
        """What the method that is unmasked does then."""
        if self.over:
            self.inner.after_step(host, t)

    def finish(self, host: Host) -> None:
        """What the method that is unmasked does before export."""
        if self.over:
            self.inner.finish(host)

    def score(self, g: Tensor, weights: Callable[[], Tensor]) -> Tensor:
        """H = |g| / (|w| + eps)^exp, or -|w|, all flat (N,); the weights are asked for where they
        count.
        """
        if self.criterion == "magnitude":
            return -weights().to(g.dtype).abs()
        if not self.exp:
            return g.abs()
        return g.abs() / (weights().to(g.dtype).abs() + self.eps) ** self.exp

    def _parts(self, host: Host) -> tuple[Budget, list[tuple[Site, ID3Delta]]]:
        name = next(name for name, method in host.adapters.items() if method is self)
        sites = [(site, cast(ID3Delta, delta)) for site, delta in host.deltas(name)]
        return cast(Budget, host.shared(name)), sites

    def hf_refuses(self, host: Host, name: str) -> str:
        """Peft's nearest, SHiRA, fixes the number of entries of every module."""
        return "peft's SHiRA has r * (d_in + d_out) entries in every module, ID3 any number"
