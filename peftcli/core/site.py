"""Site: where a delta may sit. Finding the sites that a recipe's target patterns mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftcli.core import weights
from peftcli.core.graft import is_own
from peftcli.errors import ConfigError, nearest
from peftcli.models.roles import Layout

Rows = tuple[tuple[int, int], ...]


def path_of(model: nn.Module, module: nn.Module) -> str:
    """Where a module of the model is."""
    return next(path for path, m in model.named_modules() if m is module)


@dataclass(frozen=True)
class Site:
    """A module of the model with its role.

    `d_in` and `d_out` are the sides of its dense weight (O, I): O = d_out, I = d_in (for a
    convolution the inputs of one group times the kernel). `rows` are the output rows of one role of
    a fused linear, as (start, stop).
    """

    path: str
    module: nn.Module
    kind: str  # linear | conv | embedding, or a place: norm | attention | mlp | block | model
    d_in: int
    d_out: int
    role: str | None = None
    layer: int | None = None  # index of the transformer block
    rows: Rows | None = None
    groups: int = 1

    @property
    def device(self) -> torch.device:
        """Where the site's weight is."""
        return next(self.module.parameters()).device

    @property
    def weight(self) -> Tensor:
        """The site's dense weight (d_out, d_in)."""
        W = weights.dense(self.module).detach()
        return W if self.rows is None else torch.cat([W[start:stop] for start, stop in self.rows])

    def pick(self, patterns: Mapping[str, float], default: float) -> float:
        """The value under this site's name; else of the first pattern that is its role, or a
        regular expression for the end of its path.
        """
        if self.name in patterns:
            return patterns[self.name]
        return next((value for p, value in patterns.items() if self.fits(p)), default)

    def fits(self, pattern: str) -> bool:
        """Whether the pattern is this site's name or role, or a regular expression for the end of
        its path.
        """
        if pattern in (self.name, self.role):
            return True
        wanted = expression("method", pattern).pattern
        return re.fullmatch(rf"(.*\.)?({wanted})", self.path) is not None

    @property
    def name(self) -> str:
        """The path, with the role where the site is a part of a fused linear."""
        return f"{self.path}[{self.role}]" if self.rows else self.path


def find_sites(
    model: nn.Module, layout: Layout, targets: str | Sequence[str]
) -> tuple[list[Site], dict[str, int]]:
    """The sites that `targets` mean, in the model's order, and how many each entry matched.

    An entry is a role (q, k, v, o, gate, up, down, ...), `all-linear` (every linear of the
    transformer blocks), `backbone` (every linear and convolution but those of heads), the name or
    the path of a module, or a regular expression for whole paths. An entry that matches nothing
    stops the run.
    """
    entries = [targets] if isinstance(targets, str) else list(targets)
    if not entries:
        raise ConfigError(
            "method.target_modules is empty. Name roles (q, v), modules, or all-linear."
        )
    found: dict[str, Site] = {}
    counts: dict[str, int] = {}
    for entry in entries:
        sites = list(_match(model, layout, entry))
        if not sites:
            raise ConfigError(_nothing_matches(model, layout, entry))
        counts[entry] = len(sites)
        found |= {site.name: site for site in sites}
    whole = {site.path for site in found.values() if site.rows is None}
    found = {name: s for name, s in found.items() if s.rows is None or s.path not in whole}
    order = {path: i for i, (path, _) in enumerate(model.named_modules())}
    return sorted(found.values(), key=lambda s: (order[s.path], s.rows or ())), counts


def find_places(model: nn.Module, layout: Layout, kind: str) -> list[Site]:
    """Every norm, attention, mlp or block, or the `model` itself, in the model's order.

    `d_in` and `d_out` are both the width of what goes through: the outermost module of a kind
    stands for what it holds (BERT's attention around its self-attention), and a norm's width is
    that of its scale.
    """
    modules = dict(model.named_modules())
    paths = [p for p, role in layout.names.items() if role == kind]
    inner = {p for p in paths if kind != "norm" and any(lies_in(p, q) for q in paths)}
    sites = []
    for path in (p for p in paths if p not in inner):
        module = modules[path]
        if kind == "norm" and getattr(module, "weight", None) is None:
            continue
        width = weights.shape(module)[0] if kind == "norm" else width_of(path, modules, layout)
        tower = (path, module, kind, width, width, kind, layout.block_of(path))
        sites.append(Site(*tower))
    return sites


def lies_in(path: str, other: str) -> bool:
    """Whether the module `path` is inside of `other`."""
    return path != other and path.startswith(other + ".")


def width_of(path: str, modules: Mapping[str, nn.Module], layout: Layout) -> int:
    """Features of what a place gives: those of its last o or down, else the model's hidden size."""
    ends = [p for p, role in layout.names.items() if role in ("o", "down") and lies_in(p, path)]
    if path and ends:
        return weights.shape(modules[ends[-1]])[0]
    config: Any = cast(Any, modules[""]).config
    return config.get_text_config().hidden_size


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with a weight matrix, by path, without the deltas' own.

    T5's and BART's `shared` is left out: its weight is looked up through the stacks' own tables.
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    for path, module in model.named_modules():
        if not weights.has_weight_matrix(module) or is_own(path):
            continue
        twins = [t for t in tables if t is not module and t.weight is module.weight]
        if not (path.rpartition(".")[2] == "shared" and twins):
            yield path, module


def _match(model: nn.Module, layout: Layout, entry: str) -> Iterator[Site]:
    """Sites of one entry. What it may be is tried in this order: all-linear, backbone, a role,
    a name or path, an expression.
    """
    modules = list(candidates(model))
    if entry == "all-linear":
        for path, module in modules:
            if layout.block_of(path) is not None and weights.kind_of(module) != "embedding":
                yield make_site(path, module, layout)
        return
    if entry == "backbone":
        for path, module in modules:
            is_head = layout.role_of(path) in ("head", "classifier", "pooler")
            if weights.kind_of(module) != "embedding" and not is_head:
                yield make_site(path, module, layout)
        return
    by_role = [
        (p, m, rows) for p, m in modules for r, rows in layout.roles_of(p).items() if r == entry
    ]
    if by_role:
        for path, module, rows in by_role:
            yield make_site(path, module, layout, entry, rows)
        return
    named = [(p, m) for p, m in modules if p == entry or p.endswith("." + entry)]
    for path, module in named or _full_matches(entry, modules):
        yield make_site(path, module, layout)


def _full_matches(
    pattern: str, modules: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    found = expression("method.target_modules", pattern)
    return [(p, m) for p, m in modules if found.fullmatch(p)]


def expression(key: str, pattern: str) -> re.Pattern[str]:
    """The regular expression that is written under a key. Raises `ConfigError` where it is none."""
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ConfigError(
            f"{key}: {pattern!r} is no name and no regular expression: {e}."
        ) from None


def make_site(
    path: str, module: nn.Module, layout: Layout, role: str | None = None, rows: Rows | None = None
) -> Site:
    """The site of a module with a weight matrix; its role, where it has just one, is looked up."""
    d_out, d_in = weights.shape(module)
    if role is None:
        roles = layout.roles_of(path)
        role = next(iter(roles)) if len(roles) == 1 else None
    if rows is not None:
        d_out = sum(stop - start for start, stop in rows)
    groups = getattr(module, "groups", 1)
    return Site(
        path,
        module,
        weights.kind_of(module),
        d_in,
        d_out,
        role,
        layout.block_of(path),
        rows,
        groups,
    )


def _nothing_matches(model: nn.Module, layout: Layout, entry: str) -> str:
    paths = [path for path, _ in candidates(model)]
    roles = {r for p in paths for r in layout.roles_of(p)}
    names = {path.rsplit(".", 1)[-1] for path in paths}
    near = nearest(entry, ["all-linear", "backbone", *sorted(roles), *sorted(names), *paths])
    return (
        f"method.target_modules: {entry!r} matches no module of {type(model).__name__}."
        + (f" Nearest: {', '.join(near)}." if near else "")
        + f" Roles: {', '.join(sorted(roles))}, all-linear, backbone."
        + f" Names: {', '.join(sorted(names))}."
    )
