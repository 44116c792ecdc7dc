"""IA3, Infused Adapter by Inhibiting and Amplifying Inner Activations: Few-Shot Parameter-Efficient
Fine-Tuning is Better and Cheaper than In-Context Learning. Liu et al., NeurIPS 2022, arXiv
2205.05638.

    keys, values    y = l * (W x + b)      l (O,)
    feed-forward    y = W (l * x) + b      l (I,)

Learned vectors turn keys, values and the inner activations of the feed-forward up or down; three a
block suffice, and they fold into the weights afterwards.

The keys are scaled before rotary positions and before a norm of the keys, as in Hugging Face peft.
A gated feed-forward is scaled once, at the input of `down`: the authors scale the output of `up`,
which is the same function. The default places are the paper's; peft's own lists name q in place of
k for some models (gemma, qwen2, phi), and `target_modules` can say the same. The three losses of
the paper's recipe (T-Few), which compare answer choices, are `trainer.loss=tfew`. Rows of one batch
with different vectors, one task each, are left out: an adapter is active for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from peftcli.core import weights
from peftcli.core.delta import Delta, InputDelta, OutputDelta
from peftcli.core.graft import deltas_of
from peftcli.core.method import Method
from peftcli.core.rows import RowsDelta
from peftcli.core.site import Site
from peftcli.errors import ConfigError
from peftcli.export.hf_peft import target_names

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration


class OutputScale(OutputDelta):
    """y' = l * y  (Liu et al. 2022, section 3.3)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.axis = weights.channel_axis(site.module)
        self.l = nn.Parameter(torch.ones(site.d_out))  # (O,), one so that y' = y at the start

    def edit(self, y: Tensor, x: Tensor) -> Tensor:
        """Each channel of the output times its scale."""
        return y * weights.along(self.l, y, self.axis)

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W' = l[:, None] W, b' = l b."""
        return self.l[:, None] * W, None if b is None else self.l * b


class InputScale(InputDelta):
    """x' = l * x  (Liu et al. 2022, section 3.3)."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.axis, self.groups = weights.channel_axis(site.module), site.groups
        channels = getattr(site.module, "in_channels", site.d_in)
        self.l = nn.Parameter(torch.ones(channels))  # (I,), one so that x' = x at the start

    def edit(self, x: Tensor) -> Tensor:
        """Each channel of the input times its scale."""
        return (x * weights.along(self.l, x, self.axis)).to(x.dtype)

    def merged(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W' = W l[None, :]; each group of a convolution has its own part of l."""
        O = W.shape[0]  # noqa: E741
        per_row = self.l.view(self.groups, 1, -1).expand(-1, O // self.groups, -1)
        per_row = per_row.reshape(O, -1, 1)  # (O, I/groups, 1)
        return (W.reshape(O, per_row.shape[1], -1) * per_row).flatten(1), b


@dataclass(frozen=True)
class IA3(Method):
    """Scales of keys, values and inner feed-forward activations."""

    family: ClassVar[str] = "scale-shift"
    peft_type: ClassVar[str | None] = "IA3"
    hf_harmless: ClassVar[frozenset[str]] = frozenset(
        "fan_in_fan_out feedforward_modules init_ia3_weights".split()
    )

    target_modules: str | tuple[str, ...] = ("k", "v", "down")
    feedforward_modules: str | tuple[str, ...] = ("down",)

    def setup(self, host: Host, data: Calibration | None = None) -> None:
        """Scales on every target. Raises ConfigError for a feed-forward entry that is no target."""
        sites = host.find(self.target_modules)
        for entry in self._feedforward():
            if not any(site.pick({entry: 1}, 0) for site in sites):
                raise ConfigError(
                    f"method.feedforward_modules: {entry!r} is none of the targets. Add it to "
                    "method.target_modules, or leave it out here."
                )
        for site in sites:
            host.graft(site, self.build(site))

    def _feedforward(self) -> tuple[str, ...]:
        entries = self.feedforward_modules
        return (entries,) if isinstance(entries, str) else entries

    def build(self, site: Site) -> OutputScale | InputScale:
        """A scale of the site's input where it is a feed-forward module, else of its output."""
        if site.kind == "embedding":
            raise ConfigError(
                f"method.target_modules: {site.path} is an embedding; IA3 scales linears and "
                "convolutions."
            )
        is_feedforward = site.pick(dict.fromkeys(self._feedforward(), 1), 0)
        return InputScale(site) if is_feedforward else OutputScale(site)

    # -- Hugging Face peft -------------------------------------------------------------------------
    def hf_refuses(self, host: Host, name: str) -> str | None:
        """peft has one vector a module, and no Conv1d."""
        for site, delta in host.deltas(name):
            if isinstance(delta, InputScale) and site.rows is not None:
                return f"peft has one scale for the whole input of {site.path}"
            if isinstance(site.module, nn.Conv1d):
                return "peft's IA3 does not know nn.Conv1d"
        return None

    def hf_module(self, module: nn.Module, delta: Delta) -> dict[str, Tensor]:
        """l as (O, 1) or (1, I), for a convolution (1, C, 1, ...); rows of a fused linear that have
        no scale are one.
        """
        if isinstance(module, _ConvNd):
            scale = cast(Any, delta).l
            return {"ia3_l": scale.view(1, -1, *[1] * len(module.kernel_size))}
        if isinstance(delta, InputScale):
            return {"ia3_l": delta.l.view(1, -1)}
        return {"ia3_l": _whole(delta).view(-1, 1)}

    def hf_config(self, host: Host, name: str) -> dict[str, Any]:
        """Names of the targets, and of those among them whose input is scaled."""
        held = {s.path: deltas_of(s.module)[name] for s in host.sites[name]}
        inputs = {path for path, delta in held.items() if isinstance(delta, InputScale)}
        names, chosen = target_names(host.model, set(held)), target_names(host.model, inputs)
        meant = {path for path in held if path.endswith(tuple(chosen))}  # peft's rule
        if meant != inputs or not set(chosen) <= set(names):
            names, chosen = sorted(held), sorted(inputs)
        modules = [host.model.get_submodule(path) for path in held]
        return {
            "target_modules": names,
            "feedforward_modules": chosen,
            "fan_in_fan_out": all(isinstance(m, Conv1D) for m in modules),
            "init_ia3_weights": True,
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """The modules whose input is scaled."""
        entries = config.get("feedforward_modules") or ()
        return {"feedforward_modules": entries if isinstance(entries, str) else tuple(entries)}


def _whole(delta: Delta) -> Tensor:
    """The scales of all of a module's outputs."""
    if isinstance(delta, OutputScale):
        return delta.l
    assert isinstance(delta, RowsDelta), type(delta)
    parts = {role: cast(OutputScale, delta.part(role)).l for role in delta.parts}
    whole = next(iter(parts.values())).new_ones(delta.d_out)
    for role, part in parts.items():
        whole[delta.index(role)] = part.detach()
    return whole
