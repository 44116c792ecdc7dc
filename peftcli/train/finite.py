"""NaN and infinity, found as fast as memory is read, and steps that are not taken for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftcli.errors import NonFinite
from peftcli.train.folder import write_json

if TYPE_CHECKING:
    from peftcli.data.collate import Example
    from peftcli.train.loop import Loop


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that hold NaN or infinity."""
    floats = {k: t.detach() for k, t in tensors.items() if t.is_floating_point() and t.ndim}
    if not floats:
        return []
    # L2 norms of all in one pass; those of huge finite numbers overflow, too
    norms = torch._foreach_norm(list(floats.values()))  # pyright: ignore[reportPrivateImportUsage]
    sound = torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite()
    suspects = [name for name, fine in zip(floats, sound.tolist(), strict=True) if not fine]
    return [name for name in suspects if not floats[name].isfinite().all()]


def refuse_step(
    loop: Loop, examples: Sequence[Example], loss: float, norm: float, broken: int
) -> None:
    """Leave the weights alone and write down which examples it was. `broken`: tensors of the
    optimizer's state that are not finite. Raises `NonFinite` where it goes on, or would.
    """
    loop.progress.nonfinite += 1
    step, where = loop.progress.step, loop.folder.path
    if loop.ranks.is_main:
        numbers = {"loss": repr(loss), "grad_norm": repr(norm), "optimizer_tensors": broken}
        record = {"step": step, **numbers, "examples": [str(e["id"]) for e in examples]}
        write_json(where / f"nonfinite-{step:06d}.json", record)
    said = f"loss {loss}, gradient norm {norm}"
    said += f", {broken} tensors of the optimizer's state not finite" if broken else ""
    loop.screen.note(f"step {step}: {said}; the step was not taken")
    if not_finite(loop.host.trained()):
        raise NonFinite(
            f"the weights are not finite before step {step} ({said}): an earlier step made "
            "them so, and nothing was saved of them. `peft-train RUN_FOLDER` goes on from the "
            "newest checkpoint; a lower optimizer.lr needs resume=STEP_FOLDER."
        )
    if loop.progress.nonfinite >= loop.settings.nonfinite_patience:
        raise NonFinite(
            f"loss, gradients or the optimizer's state were not finite "
            f"{loop.progress.nonfinite} steps in a row (step {step}: {said}). The weights are "
            "those before. Lower optimizer.lr, set trainer.bf16=false, or look at the examples "
            f"in {where}/nonfinite-*.json."
        )
