"""Which examples train and which are held out, told by a hash of their content.

With `eval_fraction` a row's side depends on its own content and `dataset.seed` alone, so adding
rows moves no other. With `eval_samples` the rows with the smallest hashes are held out: a new row
may displace one of them, and nothing ever moves from training to evaluation. Rows with the same key
(see `formats`) are never on both sides, nor in both halves of what is held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

from peftcli.data.records import Record
from peftcli.errors import DataError

HASHES = 2**64


class Sides(NamedTuple):
    """Records of one source by their purpose, in the file's order."""

    train: list[Record]
    held_out: list[Record]


def order(record: Record, seed: int) -> int:
    """A number in [0, 2^64) that belongs to the record's key under this seed."""
    return int.from_bytes(
        hashlib.blake2b(record.key.encode(), digest_size=8, salt=str(seed).encode()[:16]).digest()
    )


def smallest(records: Sequence[Record], count: int, seed: int) -> list[Record]:
    """The `count` records with the smallest hashes, in their order; ties go by position."""
    ranked = sorted(range(len(records)), key=lambda i: (order(records[i], seed), i))
    return [records[i] for i in sorted(ranked[:count])]


def hold_out(records: Sequence[Record], fraction: float, samples: int | None, seed: int) -> Sides:
    """Hold out `samples` records or, where that is None, a fraction."""
    if samples is None:
        limit = int(fraction * HASHES)
        hashes = [order(r, seed) for r in records]
        train = [r for r, h in zip(records, hashes, strict=True) if h >= limit]
        return Sides(train, [r for r, h in zip(records, hashes, strict=True) if h < limit])
    held_out = smallest(records, samples, seed)
    return Sides(without(records, held_out), held_out)


def half(records: Sequence[Record], part: Literal["all", "tuning", "report"]) -> list[Record]:
    """All records, or one of two halves: which is told by a record's key alone, so that no setting
    moves an example from the half that is tuned on to the one that is reported.
    """
    if part == "all":
        return list(records)
    return [r for r in records if order(r, 0) % 2 == (part == "report")]


def without(records: Sequence[Record], held_out: Sequence[Record]) -> list[Record]:
    """The records that have no key with a held-out one in common."""
    keys = {r.key for r in held_out}
    return [r for r in records if r.key not in keys]


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in the proportion of the weights that sum to `total` (largest remainders)."""
    parts = [Fraction(w) for w in weights]
    exact = [total * part / sum(parts) for part in parts]
    counts = [int(x) for x in exact]
    rest = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def largest_total(weights: Sequence[float], available: Sequence[int]) -> int:
    """The largest mixture that uses no example twice: the first source that runs short ends it."""
    parts = [Fraction(w) for w in weights]
    total = int(min(n * sum(parts) / part for n, part in zip(available, parts, strict=True)))
    while any(c > n for c, n in zip(shares(weights, total), available, strict=True)):
        total -= 1
    return total


def draw(
    sources: Sequence[Sequence[Record]],
    weights: Sequence[float],
    total: int | None,
    seed: int,
    key: str,
) -> list[Record]:
    """`total` records (None: all that the weights allow) in their proportion, each at most once."""
    available = [len(s) for s in sources]
    most = largest_total(weights, available)
    if total is not None and total > most:
        raise DataError(
            f"dataset.{key}={total}, but there are {' + '.join(map(str, available))} examples, and "
            f"without repeating any {'' if len(sources) == 1 else 'the weights '}allow {most}. Set "
            f"dataset.{key}={most} or less."
        )
    counts = shares(weights, most if total is None else total)
    return [r for s, n in zip(sources, counts, strict=True) for r in smallest(s, n, seed)]
