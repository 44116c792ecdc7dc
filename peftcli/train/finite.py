"""NaN and infinity, found as fast as memory is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


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
