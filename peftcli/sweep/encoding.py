"""Points of a space as the numbers that a regression takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from peftcli.sweep.space import Choices, Dimension, Point, Space

if TYPE_CHECKING:
    from numpy import ndarray


def encoded(space: Space, U: ndarray) -> ndarray:
    """(..., C) of positions U (..., D) in the unit cube, each as what is run there, so that a model
    cannot see differences that no run has (E. Garrido-Merchan, D. Hernandez-Lobato, "Dealing with
    Categorical and Integer-valued Variables in Bayesian Optimization with Gaussian Processes",
    Neurocomputing 2020): a number by its position, on its own scale, whole numbers and ordered
    choices rounded to theirs; other choices one-hot, any two at distance 1.
    """
    import numpy as np

    columns = [_columns(d, U[..., k]) for k, d in enumerate(space.dimensions)]
    return np.concatenate(columns, axis=-1) if columns else np.empty((*U.shape[:-1], 0))


def traits_of(space: Space, point: Point) -> tuple[float, ...]:
    """One point as numbers (C,)."""
    import numpy as np

    return tuple(encoded(space, np.array(space.position(point))).tolist())


def _columns(d: Dimension, u: ndarray) -> ndarray:
    import numpy as np

    if isinstance(d, Choices):
        index = np.minimum((u * d.size).astype(int), d.size - 1)
        one_hot = np.eye(d.size)[index] / np.sqrt(2.0)
        return (index[..., None] + 0.5) / d.size if d.is_ordered else one_hot
    if d.integer:
        low, high = d.ends
        value = low + u * (high - low)
        rounded = np.rint(np.exp(value) if d.log else value).clip(d.low, d.high)
        u = ((np.log(rounded) if d.log else rounded) - low) / (high - low)
    return u[..., None]
