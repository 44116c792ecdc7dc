"""Head of the selective family: methods that train weights of the base itself, some of them, or
some at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from peftcli.core.graft import is_own

if TYPE_CHECKING:
    from peftcli.core.host import Host


def base_names(host: Host) -> dict[str, str]:
    """Every name of a parameter of the base: the name that it trains under. They differ where one
    tensor has several names (tied embeddings).
    """
    model = host.model
    first = {p: n for n, p in model.named_parameters() if not is_own(n)}
    every = model.named_parameters(remove_duplicate=False)
    return {n: first[p] for n, p in every if not is_own(n)}


def inside(names: Iterable[str], paths: Iterable[str]) -> list[str]:
    """The names of parameters that lie in the modules `paths`."""
    starts = tuple(f"{path}." for path in paths)
    return [name for name in names if name.startswith(starts)]


def switch(host: Host, mine: Iterable[str], active: set[str], forget: bool = True) -> None:
    """Of the selected parameters `mine` exactly `active` train from now on. The optimizer forgets
    those that leave (`forget`), so that they start anew when they come back.
    """
    trained = host.trained()
    leaving = [name for name in mine if name in trained and name not in active]
    if forget:
        host.reset_optimizer(trained[name] for name in leaving)
    host.freeze(leaving)
    host.thaw(active)
