"""Sublayer: the attention and feed-forward parts of transformer blocks, with what reads and adds
their outputs. Adapters sit there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from peftcli.core.site import Site, lies_in, make_site, width_of
from peftcli.models.roles import Layout, is_cross, residual_of


@dataclass(frozen=True)
class Sublayer:
    """An attention or feed-forward sub-layer, with its raw output u and its residual r."""

    kind: str  # attn | cross | ffn
    start: Site  # sees the sub-layer's input first
    end: Site  # gives u
    norm: Site | None  # post-norm models: sees u + r
    stream: Site | None  # others: gives u + r; None in the middle of a block
    entry: Site | None  # others: the norm that sees r; None where it cannot be told


def find_sublayers(model: nn.Module, layout: Layout) -> list[Sublayer]:
    """Every sub-layer of every block, in the model's order.

    The output u is that of the last linear, before the base's dropout; where a feed-forward part
    has several such (experts), that of the whole part.
    """
    modules = dict(model.named_modules())

    def place(path: str, kind: str) -> Site:
        width = width_of(path, modules, layout)
        return Site(path, modules[path], kind, width, width, kind, layout.block_of(path))

    found = []
    for block in layout.blocks:
        style = residual_of(model, block)
        ends = _ends_of(block, layout)
        norms = [p for p, role in layout.names.items() if role == "norm" and lies_in(p, block)]
        if style == "post" and len(norms) != len(ends):
            continue
        entries = [None] * len(ends) if style == "post" else _entries(norms, ends, layout)
        for i, (path, kind) in enumerate(ends):
            whole = layout.names[path] == "mlp"
            end = place(path, "mlp") if whole else make_site(path, modules[path], layout)
            norm = place(norms[i], "norm") if style == "post" else None
            around = _wrapper(path, block, layout) or (block if kind == "ffn" else None)
            stream = place(around, "residual") if around and style == "pre" else None
            if style == "parallel" and kind == "ffn":  # the residual is the attention's
                stream = end
            first = _start_of(path, kind, block, layout)
            linear = layout.names[first] not in ("mlp", "attention")
            start = make_site(first, modules[first], layout) if linear else place(first, kind)
            into = entries[i]
            entry = None if into is None else place(into, "norm")
            found.append(Sublayer(kind, start, end, norm, stream, entry))
    return found


def _ends_of(block: str, layout: Layout) -> list[tuple[str, str]]:
    """(path, kind) of what gives each sub-layer's output."""
    inside = {p: role for p, role in layout.names.items() if lies_in(p, block)}
    down = [p for p, role in inside.items() if role == "down"]
    mlps = [p for p, role in inside.items() if role == "mlp"]
    ffn = down if len(down) == 1 else [p for p in mlps if not any(lies_in(p, q) for q in mlps)]
    kinds = {p: "cross" if is_cross(p) else "attn" for p, role in inside.items() if role == "o"}
    kinds |= dict.fromkeys(ffn, "ffn")
    return [(p, kinds[p]) for p in inside if p in kinds]


def _start_of(end: str, kind: str, block: str, layout: Layout) -> str:
    """The whole attention or feed-forward module around `end`; else the block's first linear up."""
    role = "mlp" if kind == "ffn" else "attention"
    inside = {p: r for p, r in layout.names.items() if lies_in(p, block)}
    around = [p for p, r in inside.items() if r == role and (p == end or lies_in(end, p))]
    return next(iter(around or [p for p, r in inside.items() if r in ("up", "gate", "gate_up")]))


def _entries(norms: list[str], ends: list[tuple[str, str]], layout: Layout) -> list[str | None]:
    """The norm before each sub-layer, where there is one for each or one for all. A norm that does
    not say that it is a cross-attention's is not taken for one.
    """
    parts = [p for p, role in layout.names.items() if role in ("attention", "mlp")]
    outer: list[str | None] = [n for n in norms if not any(lies_in(n, part) for part in parts)]
    outer = outer * len(ends) if len(outer) == 1 else outer
    odd = any(
        kind == "cross" and n.rpartition(".")[0] not in path and not re.search("cross|encoder", n)
        for n, (path, kind) in zip(outer, ends, strict=False)
        if n is not None
    )
    return [None] * len(ends) if odd or len(outer) != len(ends) else outer


def _wrapper(path: str, block: str, layout: Layout) -> str | None:
    """T5's module around one sub-layer, with its norm and its sum."""
    inner = path
    while lies_in(inner := inner.rpartition(".")[0], block):
        norms = [p for p, role in layout.names.items() if role == "norm"]
        if inner not in layout.names and any(p.rpartition(".")[0] == inner for p in norms):
            return inner
    return None
