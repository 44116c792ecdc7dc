"""Features of frozen blocks, computed once: what lies below the lowest block that trains gives the
same for an example in every epoch.

An example is computed alone, the first time it is seen, and kept: N tokens of width D are N D
numbers in memory. So the features do not depend on the batch, and a run that was stopped computes
the same ones again. Only training uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftcli.core.delta import Delta
from peftcli.core.layer import Layer
from peftcli.errors import ConfigError, NotApplicable

if TYPE_CHECKING:
    from peftcli.core.host import Host
    from peftcli.core.scores import Calibration

ROW = ("input_ids", "attention_mask", "token_type_ids")  # what an example is, by argument name


class _Reached(Exception):  # noqa: N818 - no error: the rest of the model is not needed
    """The features of the last frozen block."""


class FrozenPrefix(Delta):
    """At the model: the `blocks` pass, and the last of them gives the kept features (B, T, D)."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = tuple(blocks)  # not children: the model has them
        self.kept: dict[bytes, Tensor] = {}  # an example's ids: its features (T, D)

    def forward(self, x: dict[str, Any], layer: Layer) -> Any:
        """The model on the batch, in training without its frozen blocks."""
        if not self.training:
            return layer(x)
        rows = [self._features(row, layer) for row in _rows(x)]
        T = x["input_ids"].shape[1]
        features = torch.stack([F.pad(row, (0, 0, 0, T - len(row))) for row in rows])  # (B, T, D)
        with (
            answering(self.blocks[:-1], lambda h, *_, **__: h),
            answering(self.blocks[-1:], lambda *_, **__: features),
        ):
            return layer(x)

    def _features(self, row: dict[str, Tensor], layer: Layer) -> Tensor:
        key = b"".join(row[name].cpu().numpy().tobytes() for name in ROW if name in row)
        if key not in self.kept:
            alone = {**row, "use_cache": False} if _is_decoder(layer.module) else row
            self.kept[key] = reached(self.blocks[-1], lambda: layer(alone))[0]
        return self.kept[key]


def cache_prefix(host: Host, data: Calibration | None) -> None:
    """Keep the features of the blocks below what trains. Raises `NotApplicable` where nothing is
    frozen there, or the model's features are not those of its tokens alone; `ConfigError` where
    they are drawn anew every time.
    """
    model = cast(Any, host.model)
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder:
        raise NotApplicable(
            f"method.cache_frozen_prefix keeps what a single stack makes of a text, and "
            f"{type(model).__name__} is none (images may be augmented); leave it false."
        )
    blocks = [host.model.get_submodule(path) for path in _frozen_blocks(host)]
    if data is not None:
        _refuse_dropout(host.model, blocks[-1], data)
    host.graft(host.places("model")[0], FrozenPrefix(blocks))


def _frozen_blocks(host: Host) -> list[str]:
    """The blocks before everything that trains, by the order of the model's parameters."""
    blocks, names = host.layout.blocks, [n for n, _ in host.model.named_parameters()]
    first = next(n for n in names if n in host.selected)
    before = names[: names.index(first)]
    frozen = []
    for block in blocks:
        mine = [n for n in names if n.startswith(f"{block}.")]
        if not set(mine) <= set(before):
            break
        frozen.append(block)
    if not frozen:
        raise NotApplicable(
            f"{first} of {type(host.model).__name__} trains, and no block lies below it: there is "
            "nothing to keep; leave method.cache_frozen_prefix false."
        )
    return frozen


def _refuse_dropout(model: nn.Module, block: nn.Module, data: Calibration) -> None:
    batch, was_training = next(iter(data.batches(1))), model.training
    model.train()
    one, two = (reached(block, lambda: data.forward(batch)) for _ in range(2))
    model.train(was_training)
    if not torch.equal(one, two):
        raise ConfigError(
            "method.cache_frozen_prefix=true: the frozen blocks drop out at random, so their "
            "features differ at every step. Leave it false, or take a model whose config.json has "
            "no dropout."
        )


@torch.no_grad()
def reached(block: nn.Module, run: Callable[[], Any]) -> Tensor:
    """The block's output in `run`, which ends there."""
    bare = block.forward

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise _Reached(bare(*args, **kwargs))

    with answering([block], stop):
        try:
            run()
        except _Reached as found:
            return found.args[0]
    raise AssertionError("the model did not reach its block")


@contextmanager
def answering(modules: Sequence[nn.Module], answer: Callable[..., Any]) -> Iterator[None]:
    """Within, each of the modules gives `answer(input, ...)`, compiled ones too."""
    held = [(cast(Any, module), module._compiled_call_impl) for module in modules]
    for module, _ in held:
        module.forward, module._compiled_call_impl = answer, None
    try:
        yield
    finally:
        for module, compiled in held:
            del module.forward
            module._compiled_call_impl = compiled


def _rows(x: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Each example (1, T) of a batch that is padded on the right."""
    ids, mask = x["input_ids"], x.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    for i, n in enumerate(lengths):
        yield {name: x[name][i : i + 1, :n] for name in ROW if x.get(name) is not None}


def _is_decoder(model: nn.Module) -> bool:
    return cast(Any, model).can_generate()
