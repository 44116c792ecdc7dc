"""Chance that belongs to what it is drawn for, so that whoever draws it again gets the same."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.random import Generator


def draw(*parts: int | str) -> int:
    """A whole number in [0, 2^32) that belongs to `parts`."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest())


def stream(*parts: int | str) -> Generator:
    """A random stream that belongs to `parts`."""
    from numpy.random import default_rng

    return default_rng(draw(*parts))
