"""What merging did to the outputs, measured on held-out examples: exact arithmetic would change
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftcli.build import Parts, collator
from peftcli.train import objective


def change(before: Tensor, after: Tensor) -> dict[str, float]:
    """From the outputs (N, V) of one model to another's: largest difference of a logit, and how
    often the largest logit is the same.
    """
    return {
        "outputs": len(before),
        "max_abs_difference": (after - before).abs().max().item(),
        "max_abs_output": before.abs().max().item(),
        "same_prediction": (after.argmax(-1) == before.argmax(-1)).float().mean().item(),
    }


@torch.inference_mode()
def outputs(parts: Parts, num_examples: int = 32) -> Tensor:
    """Logits (N, V) at the targets of the first held-out examples."""
    assert parts.data is not None
    examples = parts.data.eval or parts.data.train
    batch = collator(parts)([examples[i] for i in range(min(num_examples, len(examples)))])
    parts.model.eval()
    logits = objective.predict(parts.model, batch.to(parts.device)).float().cpu()
    return logits.reshape(-1, logits.shape[-1])
