"""The last linear of a language model, where its output is the model's logits as they are, so that
the loss can be taken inside it and all logits together are never made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


@torch.no_grad()
def direct_head(model: Any) -> nn.Linear | None:
    """The model's head, or None where something follows it (a soft cap, a scale) or it is no plain
    linear. Tried on the model itself: marks in place of the head's output must come out as logits.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if type(head) is not nn.Linear:
        return None
    marks: list[Tensor] = []

    def mark(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        marks.append(torch.linspace(-200, 200, output.numel()).reshape(output.shape).to(output))
        return marks[-1]

    hook = head.register_forward_hook(mark)
    was_training = model.training
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
        call = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        logits = model.eval()(input_ids=ids, use_cache=False, **call).logits
    finally:
        hook.remove()
        model.train(was_training)
    return head if len(marks) == 1 and torch.equal(marks[0], logits) else None


@contextmanager
def answering(
    head: nn.Linear, answer: Callable[[Tensor, Tensor, Tensor | None], Tensor]
) -> Iterator[None]:
    """Within, the head gives `answer(hidden, weight, bias)` in place of its logits."""
    cast(Any, head).forward = lambda hidden: answer(hidden, head.weight, head.bias)
    try:
        yield
    finally:
        del head.forward
