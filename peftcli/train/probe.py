"""What a forward and backward pass holds in memory, measured on one and on two examples.

Every tensor that torch makes is watched, whatever the architecture, the method or the kernel. Rows
of one length need the same each, so that two batches tell it of any other.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftcli.data.collate import Batch, Example
from peftcli.train import streams
from peftcli.train.preview import Preview


@dataclass(frozen=True)
class Line:
    """Bytes as a line in a number of elements."""

    constant: float
    slope: float

    @classmethod
    def through(cls, a: tuple[int, int], b: tuple[int, int]) -> Line:
        """The line through two measurements (elements, bytes); nothing is held below none."""
        slope = max((b[1] - a[1]) / (b[0] - a[0]), 0.0) if a[0] != b[0] else 0.0
        return cls(max(a[1] - slope * a[0], 0.0), slope)

    def at(self, elements: float) -> int:
        """Bytes of a batch of so many elements."""
        return round(self.constant + self.slope * elements)


@dataclass(frozen=True)
class Working:
    """Memory of a pass beside weights and gradients.

    `saved` is left by the forward pass for the backward one, by tokens; `answering` is held on top
    of it for a moment by the head and the loss, by targets; `turning` by the backward pass, by
    tokens.
    """

    saved: Line
    answering: Line
    turning: Line


class Watched(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, but for those of `known`."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes or key in self.known:
            return
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)

    def forget(self, tensor: Tensor) -> None:
        """Count the tensor no longer."""
        self._gone(tensor.untyped_storage()._cdata)


def measure(preview: Preview, examples: Sequence[Example]) -> Working:
    """Run a forward and backward pass on the first and on the first two of `examples`, and leave no
    trace: neither gradients nor drawn random numbers.
    """
    passes = []
    for count in range(1, min(2, len(examples)) + 1):
        passes.append(_pass(preview, preview.collate(examples[:count])))
    (tokens_a, targets_a, *a), (tokens_b, targets_b, *b) = passes[0], passes[-1]
    saved, answering, turning = zip(a, b, strict=True)
    return Working(
        Line.through((tokens_a, saved[0]), (tokens_b, saved[1])),
        Line.through((targets_a, answering[0]), (targets_b, answering[1])),
        Line.through((tokens_a, turning[0]), (tokens_b, turning[1])),
    )


def by_dimensions(model: nn.Module, dtype: torch.dtype, checkpointing: bool) -> Working:
    """The same from the dimensions alone, roughly, where weights are cut up and nothing is watched:
    inputs of products, gates, norms; one row a block when recomputed.
    """
    config: Any = model.config
    width = getattr(config, "hidden_size", None) or getattr(config, "d_model", 512)
    layers = getattr(config, "num_hidden_layers", None) or getattr(config, "num_layers", 12)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "d_ff", None) or 4 * width
    per_layer = width if checkpointing else 10 * width + 4 * inner
    nothing = Line(0.0, 0.0)
    return Working(Line(0.0, layers * per_layer * dtype.itemsize), nothing, nothing)


def num_elements(batch: Batch) -> int:
    """Tokens that are laid, padding included, or images."""
    inputs = batch.inputs
    ids = [inputs[k] for k in ("input_ids", "decoder_input_ids") if k in inputs]
    return sum(t.numel() for t in ids) or len(inputs["pixel_values"])


def run(preview: Preview, batch: Batch, between: Callable[[], None] = lambda: None) -> None:
    """A forward and backward pass that leaves no trace; `between` comes in their middle."""
    model = preview.model
    was_training = model.training
    model.train()
    with streams.stream(preview.seed, "probe"):
        loss = preview.loss(batch.to(preview.device))
        between()
        if loss.requires_grad:  # not where a method first frees weights in its steps
            loss.backward()
    model.train(was_training)
    model.zero_grad(set_to_none=True)


def _pass(preview: Preview, batch: Batch) -> tuple[int, int, int, int, int]:
    """(tokens, targets, bytes saved, on top in the forward pass, on top in the backward pass)."""
    model = preview.model
    known = [*model.parameters(), *model.buffers(), *tree_leaves(batch.inputs), batch.targets]
    watched = Watched([t for t in known if isinstance(t, Tensor)])
    saved = forward = 0

    def note() -> None:
        nonlocal saved, forward
        saved, forward = watched.now, watched.peak
        watched.peak = watched.now

    with _telling(model, watched), watched:
        run(preview, batch, note)
    turning = watched.peak - saved
    return num_elements(batch), len(batch.targets), saved, forward - saved, turning


@contextmanager
def _telling(model: nn.Module, watched: Watched) -> Iterator[None]:
    """Gradients of parameters are counted apart."""
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: watched.forget(p.grad))  # pyright: ignore
        for p in model.parameters()
        if p.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
