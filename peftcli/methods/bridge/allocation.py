"""AdaLoRA in our life cycle: the regulariser, the length of its schedule, and the allocation of
ranks after every step.

peft keeps the averages that it allocates by as attributes of its tuner. Here they are buffers, lent
to peft for its own step, so that a restart goes on from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcli.errors import ConfigError
from peftcli.methods.bridge.fields import INNER

UNKNOWN_STEPS = 10**9  # of AdaLoRA, until the loop says how many


def set_length(config: Any, num_steps: int) -> None:
    """Count down over this many steps; refused where none is left to lower ranks in."""
    config.total_step = num_steps
    if config.tinit >= num_steps - config.tfinal:
        raise ConfigError(
            f"method.config: AdaLoRA's tinit={config.tinit} and tfinal={config.tfinal} "
            f"leave nothing of the {num_steps} steps to lower its ranks in."
        )


def orthogonality(wrappers: Sequence[Any]) -> Tensor:
    """Mean of |A A^T - I| and |B^T B - I| over all A and B."""
    terms = []
    for wrapper in wrappers:
        A, B = wrapper.lora_A[INNER], wrapper.lora_B[INNER]  # (R, I), (O, R)
        eye = torch.eye(len(A), device=A.device, dtype=A.dtype)
        terms += [(A @ A.T - eye).norm(), (B.T @ B - eye).norm()]
    return torch.stack(terms).mean()


class Allocation(nn.Module):
    """AdaLoRA's averages as buffers: `sensitivity` and `uncertainty` (N,) over all of its
    parameters in turn, `kept` (K,) the triplets last kept.
    """

    def __init__(self, tuner: Any) -> None:
        super().__init__()
        own = _own(tuner.model)
        numbers = torch.cat([p.detach().flatten() for p in own.values()])
        self.register_buffer("sensitivity", torch.zeros_like(numbers))
        self.register_buffer("uncertainty", torch.zeros_like(numbers))
        self.register_buffer("gradients", torch.zeros_like(numbers), persistent=False)
        self.register_buffer("kept", numbers.new_ones(sum(_num_triplets(own).values())))

    @torch.no_grad()
    def keep_gradients(self, model: nn.Module) -> None:
        """Before the step clears them."""
        own = _own(model)
        gradients = _parts(self.get_buffer("gradients"), own)
        for name, p in own.items():
            gradients[name].zero_() if p.grad is None else gradients[name].copy_(p.grad)

    @torch.no_grad()
    def allocate(self, tuner: Any, index: int) -> None:
        """peft's own step, on these averages and gradients."""
        gradients = self.get_buffer("gradients")
        if not gradients.isfinite().all():
            return  # the step was not taken either
        own, config = _own(tuner.model), tuner.peft_config[INNER]
        self._lend(tuner, own)
        for name, gradient in _parts(gradients, own).items():
            own[name].grad = gradient
        tuner.update_and_allocate(index)
        for p in own.values():
            p.grad = None
        self._take_back(tuner, own)
        if index < config.total_step - config.tfinal:
            config.rank_pattern = None  # until then all triplets may come back

    def _lend(self, tuner: Any, own: Mapping[str, nn.Parameter]) -> None:
        """Give peft its averages, and the triplets that it kept last."""
        allocator, triplets = tuner.rankallocator, _num_triplets(own)
        sensitivity, uncertainty = self.get_buffer("sensitivity"), self.get_buffer("uncertainty")
        allocator.ipt = _parts(torch.zeros_like(sensitivity), own)
        allocator.exp_avg_ipt = _parts(sensitivity.clone(), own)
        allocator.exp_avg_unc = _parts(uncertainty.clone(), own)
        kept = self.get_buffer("kept").bool().split(list(triplets.values()))
        tuner.peft_config[INNER].rank_pattern = {
            n: k.tolist() for n, k in zip(triplets, kept, strict=True)
        }

    def _take_back(self, tuner: Any, own: Mapping[str, nn.Parameter]) -> None:
        """Keep what peft made of them."""
        allocator, pattern = tuner.rankallocator, tuner.peft_config[INNER].rank_pattern
        averages = {"sensitivity": allocator.exp_avg_ipt, "uncertainty": allocator.exp_avg_unc}
        for name, parts in averages.items():
            if parts:  # forgotten after the last allocation
                flat = torch.cat([part.flatten() for part in parts.values()])
                self.get_buffer(name).copy_(flat)
        held = self.get_buffer("kept")
        kept = [x for n in _num_triplets(own) for x in pattern[n]]
        held.copy_(torch.tensor(kept, dtype=held.dtype))


def _own(model: nn.Module) -> dict[str, nn.Parameter]:
    """AdaLoRA's parameters by their names."""
    return {n: p for n, p in model.named_parameters() if "lora_" in n and n.endswith(INNER)}


def _num_triplets(own: Mapping[str, nn.Parameter]) -> dict[str, int]:
    """How many triplets each site has, by the name of its singular values E (R, 1)."""
    return {n: len(p) for n, p in own.items() if "lora_E" in n}


def _parts(flat: Tensor, own: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Views into `flat` (N,), each parameter's in its shape."""
    parts = flat.split([p.numel() for p in own.values()])
    return {n: part.view_as(p) for (n, p), part in zip(own.items(), parts, strict=True)}
