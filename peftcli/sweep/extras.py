"""What a sweep's keys need beyond what is always installed."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from peftcli.errors import ConfigError
from peftcli.settings import Sweep

# key, its value: module, its name, the extra that has it, the value that does without
NEEDED = {
    ("search", "optuna"): ("optuna", "Optuna", "optuna", "random"),
    ("search", "metade"): ("sklearn", "scikit-learn", "sklearn", "de"),
    ("prune_model", "svr"): ("sklearn", "scikit-learn", "sklearn", "ols"),
}


def check(sweep: Sweep) -> None:
    """Refuse what cannot be done here, before anything runs.

    Raises:
        ConfigError: with what to install, and what to do without.
    """
    for (key, value), (module, name, extra, other) in NEEDED.items():
        if getattr(sweep, key) == value and find_spec(module) is None:
            raise ConfigError(
                f"sweep.{key}={value} needs {name}: pip install 'peftcli[{extra}]'. "
                f"sweep.{key}={other} needs nothing."
            )


def of_sklearn(name: str) -> Any:
    """A module of scikit-learn. It is imported as if there were no pandas, unless that is here
    already: pandas brings pyarrow, and pyarrow a thread, after which no member could be forked from
    this process (see `process`) and each would take seconds more to start.
    """
    hidden = "pandas" not in sys.modules
    if hidden:
        sys.modules["pandas"] = None  # type: ignore[assignment]
    try:
        return import_module(f"sklearn.{name}")
    finally:
        if hidden:
            del sys.modules["pandas"]
