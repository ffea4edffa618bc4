"""95 % intervals: Wilson's for a share, the bootstrap over clusters for a mean. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["Cluster", "bootstrap", "paired_bootstrap", "wilson"]

Cluster = tuple[float, float]
"""Sum and number of the values that are no independent draws, such as those of one prompt."""

DRAWS = 4000


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share of n independent trials; (0, 1) where there are none."""
    if n == 0:
        return (0.0, 1.0)
    z, p = 1.96, share
    center = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (max(0.0, center - half), min(1.0, center + half))


def bootstrap(
    strata: Sequence[Sequence[Cluster]], combine: Callable[..., np.ndarray] = np.mean, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile interval of `combine` over the strata's means, by drawing clusters anew within each stratum.

    Args:
        strata: clusters of each stratum, such as the prompts of each task.
        combine: `numpy.mean` or `numpy.sum`, called with axis=0.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        None where a stratum has fewer than two clusters, or none has two that differ: those say nothing about the spread.
    """
    if not strata or any(len(clusters) < 2 for clusters in strata):
        return None
    if all(len({total / count for total, count in clusters}) == 1 for clusters in strata):
        return None
    return _percentiles(_draws(strata, combine, seed))


def paired_bootstrap(
    strata: Sequence[Sequence[Cluster]],
    other: Sequence[Sequence[Cluster]],
    combine: Callable[..., np.ndarray] = np.mean,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Percentile interval of `bootstrap`'s figure of `strata` less that of `other`, whose clusters are of the same prompts in the
    same order: each draw takes the same clusters of both.

    Returns:
        None where a stratum has fewer than two clusters, or all differ from their partners by the same.
    """
    if not strata or any(len(clusters) < 2 for clusters in strata):
        return None
    pairs = [zip(own, others, strict=True) for own, others in zip(strata, other, strict=True)]
    if all(len({a[0] / a[1] - b[0] / b[1] for a, b in stratum}) == 1 for stratum in pairs):
        return None
    return _percentiles(_draws(strata, combine, seed) - _draws(other, combine, seed))


def _draws(strata: Sequence[Sequence[Cluster]], combine: Callable[..., np.ndarray], seed: int) -> np.ndarray:
    """`DRAWS` figures. Which clusters are drawn depends on the seed and on how many there are, not on their values."""
    rng = np.random.default_rng(seed)
    means = []
    for clusters in strata:
        sums, counts = np.asarray(clusters, dtype=np.float64).T
        drawn = np.zeros((2, DRAWS))
        for at in range(0, DRAWS, 500):  # a part at a time: thousands of clusters, thousands of draws
            chosen = rng.integers(len(clusters), size=(min(500, DRAWS - at), len(clusters)))
            drawn[:, at : at + len(chosen)] = sums[chosen].sum(1), counts[chosen].sum(1)
        means.append(drawn[0] / drawn[1])
    figures: np.ndarray = combine(np.stack(means), axis=0)
    return figures


def _percentiles(figures: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(figures, (2.5, 97.5))
    return float(low), float(high)
