"""What a sweep's keys need beyond what is always installed."""

from __future__ import annotations

from importlib.util import find_spec

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
