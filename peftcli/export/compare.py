"""What merging did to the outputs, measured on held-out examples: exact arithmetic would change
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftcli.build import Parts, collator
from peftcli.train import objective


def merged_outputs(
    parts: Parts, merge: Callable[[], None], num_examples: int = 32
) -> dict[str, Any]:
    """Run `merge`, with the model's outputs before and after: largest difference of a logit, and
    how often the largest logit is the same.
    """
    before = _outputs(parts, num_examples)
    merge()
    after = _outputs(parts, num_examples)
    return {
        "examples": num_examples,
        "max_abs_difference": (after - before).abs().max().item(),
        "max_abs_output": before.abs().max().item(),
        "same_prediction": (after.argmax(-1) == before.argmax(-1)).float().mean().item(),
    }


@torch.inference_mode()
def _outputs(parts: Parts, num_examples: int) -> Tensor:
    assert parts.data is not None
    examples = parts.data.eval or parts.data.train
    batch = collator(parts)([examples[i] for i in range(min(num_examples, len(examples)))])
    parts.model.eval()
    logits = objective.predict(parts.model, batch.to(parts.device)).float().cpu()
    return logits.reshape(-1, logits.shape[-1])
