"""Which versions of which packages a number came from."""

from __future__ import annotations

import importlib.metadata

from peftcli import __version__

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "safetensors",
    "tokenizers",
    "hydra-core",
    "bitsandbytes",
    "triton",
    "liger-kernel",
    "optuna",
    "scikit-learn",
)


def versions() -> dict[str, str]:
    """Of the packages that decide numbers, those that are installed."""
    installed = {"peftcli": __version__}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
