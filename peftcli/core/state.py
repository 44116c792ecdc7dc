"""What checkpoints and adapters' files hold of a model: the deltas' parameters and buffers, what
they share, and the base's own weights that train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from peftcli.core.graft import SHARED, is_own
from peftcli.core.shares import Share
from peftcli.errors import DataError


def of_model(model: nn.Module, selected: Collection[str]) -> dict[str, Tensor]:
    """The state as it lies in the model, by name, sorted; `selected` names weights of the base."""
    names = {n for n in model.state_dict() if is_own(n)} | {*selected}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: tensors[n].detach() for n in sorted(names) if n in tensors}


def of_adapter(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """One adapter's part of the state, under names without `name`, and the selected weights."""
    tensors = {}
    for full, tensor in state.items():
        parts = full.split(".")
        if is_own(full):
            at = next(i for i, part in enumerate(parts) if part in ("deltas", SHARED)) + 1
            if parts[at] != name:
                continue
            del parts[at]
        tensors[".".join(parts)] = tensor
    return tensors


def digest(state: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of tensors and their names."""
    found = hashlib.sha256()
    for name, tensor in state:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def fill(
    own: Mapping[str, Tensor], saved: Mapping[str, Tensor], shares: Mapping[str, Share]
) -> None:
    """Copy `saved` into the tensors `own`, into this rank's share where there is one. Raises
    `DataError` where names or shapes differ.
    """
    missing, extra = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or extra:
        raise DataError(
            f"the saved state does not fit this model and method: {len(missing)} tensors "
            f"missing {missing[:3]}, {len(extra)} not expected {extra[:3]}"
        )
    for name, tensor in own.items():
        share, value = shares.get(name), saved[name]
        shape = share.shape if share else tensor.shape
        if shape != value.shape:
            raise DataError(f"{name}: saved with shape {tuple(value.shape)}, here {tuple(shape)}")
        if share:
            share.own.copy_(share.part(value))
        else:
            tensor.copy_(value)
