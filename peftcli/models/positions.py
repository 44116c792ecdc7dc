"""Models that look their positions up have a fixed number of them; a longer row is refused before
training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from peftcli.errors import ConfigError

if TYPE_CHECKING:
    from peftcli.core.host import Host


def num_positions(host: Host) -> int | None:
    """How many tokens a row may have; None where positions are computed, or relative."""
    absolute = [
        host.model.get_submodule(path)
        for path, role in host.layout.names.items()
        if role == "position" and not path.endswith("rel_embeddings")
    ]
    sizes = [t.num_embeddings - _first(t) for t in absolute if isinstance(t, nn.Embedding)]
    return min(sizes, default=None)


def _first(table: nn.Embedding) -> int:
    """The row of the first token: OPT leaves some out, RoBERTa those up to the padding's."""
    skipped: Any = getattr(table, "offset", 0)
    return skipped if table.padding_idx is None else table.padding_idx + 1


def refuse_long_rows(host: Host, stats: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where the longest example and what the adapters lay into its row have
    more tokens than the model has positions.
    """
    most = num_positions(host)
    longest = max((stats[side] or {}).get("max_length", 0) for side in ("train", "eval"))
    taken = sum(d.takes_positions for name in host.adapters for _, d in host.deltas(name))
    if most is None or longest + taken <= most:
        return
    own = f" and {taken} of the method's own" if taken else ""
    raise ConfigError(
        f"the longest example has {longest} tokens{own}, but {type(host.model).__name__} has "
        f"{most} positions. Set dataset.max_length={most - taken} and dataset.on_overlong=truncate "
        "(or drop)."
    )
