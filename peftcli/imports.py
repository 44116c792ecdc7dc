"""Optional packages, imported without what they drag along."""

from __future__ import annotations

import importlib
import logging
import sys
from types import ModuleType

# package: what it is imported as if without
WITHOUT = {
    "bitsandbytes": "kernels",  # fetches a product from a hub, for packed weights nobody has here
    "liger_kernel": "peft",  # to look for wrapped models, which do not come to it here
    "peft": "kernels",  # imports bitsandbytes where that is installed
    "sklearn": "pandas",  # brings pyarrow, and pyarrow a thread, after which no process can fork
}


def optional(module: str) -> ModuleType:
    """A module of an optional package, without what `WITHOUT` names for that, unless it is here
    already. bitsandbytes keeps its advice to itself: that 8 bits are multiplied in 16 is known.
    """
    hidden = WITHOUT.get(module.partition(".")[0])
    if hidden == "kernels":
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if hidden is None or hidden in sys.modules:
        return importlib.import_module(module)
    sys.modules[hidden] = None  # type: ignore[assignment]
    try:
        return importlib.import_module(module)
    finally:
        del sys.modules[hidden]
