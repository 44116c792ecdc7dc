"""SSF: Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning. Lian et al.,
NeurIPS 2022, arXiv 2210.08823.

    y = gamma * op(x) + beta        gamma (C,), beta (C,)

Behind every operation of a frozen backbone each channel is scaled and shifted, which moves the
features to the new task's distribution; afterwards the pair folds into the operation before it.

The places are the paper's for vision models: every linear, convolution and norm, the patch
embedding among them, not the heads. For language models the same rule is our generalisation: token
embeddings stay as they are. A shift behind a norm without a bias (RMSNorm) folds into the biases of
the linears that read it. Where an architecture has no place for those, as the head behind Llama's
last norm, `target_modules` can name the other norms. Which module is a convolution is read off its
class; the authors' code compares sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.delta import OutputDelta
from peftcli.core.method import Method
from peftcli.core.site import Site
from peftcli.errors import ConfigError

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class SSFDelta(OutputDelta):
    """y' = gamma * y + beta  (Lian et al. 2022, eq. 2); without one of them, the other alone."""

    def __init__(self, site: Site, scale: bool, shift: bool, std: float) -> None:
        super().__init__()
        self.axis = weights.channel_axis(site.module)
        start = std * torch.randn(2, site.d_out)
        self.gamma = nn.Parameter(1 + start[0]) if scale else None  # (C,)
        self.beta = nn.Parameter(start[1]) if shift else None  # (C,)

    def edit(self, y: Tensor, x: Tensor) -> Tensor:
        """Each channel scaled, then shifted, in the delta's precision."""
        if self.gamma is not None:
            y = y * weights.along(self.gamma, y, self.axis)
        if self.beta is not None:
            y = y + weights.along(self.beta, y, self.axis)
        return y

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W' = gamma[:, None] W, b' = gamma b + beta."""
        if self.gamma is not None:
            W = self.gamma[:, None] * W
            b = None if b is None else self.gamma * b
        if self.beta is not None:
            b = self.beta if b is None else b + self.beta
        return W, b


@dataclass(frozen=True)
class SSF(Method):
    """A scale and a shift behind every operation of the backbone."""

    family: ClassVar[str] = "scale-shift"
    target_modules: str | tuple[str, ...] = ("backbone", "norm")
    ssf_scale: bool = True
    ssf_shift: bool = True
    init: Literal["normal", "identity"] = "normal"
    init_std: Annotated[float, Ge(0)] = 0.02

    @property
    def starts_at_base(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The paper's start is random."""
        return self.init == "identity"

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """A delta behind every target. `norm` means every norm; norms can be named, too."""
        if not (self.ssf_scale or self.ssf_shift):
            raise ConfigError(
                "method.ssf_scale=false and method.ssf_shift=false: nothing is left to train."
            )
        entries = self.target_modules
        entries = (entries,) if isinstance(entries, str) else entries
        norms = host.places("norm")
        host.matched[host.building] = {}
        named = {e: [s for s in norms if s.pick({e: 1}, 0)] for e in entries}
        others = [entry for entry in entries if not named[entry]]
        sites = host.find(others) if others or not entries else []
        for entry, found in named.items():
            if found:
                host.matched[host.building][entry] = len(found)
                sites += [site for site in found if site not in sites]
        for site in sites:
            if not _within(site.path, host.saved_modules):
                host.graft(site, self.build(site))

    def build(self, site: Site) -> SSFDelta:
        """gamma ~ N(1, std^2), beta ~ N(0, std^2)."""
        std = self.init_std if self.init == "normal" else 0.0
        return SSFDelta(site, self.ssf_scale, self.ssf_shift, std)


def _within(path: str, modules: tuple[str, ...]) -> bool:
    """Whether the path is one of the modules, or inside one."""
    return any(f"{path}.".startswith(f"{module}.") for module in modules)
