"""Which of a round's updates have a norm unlike the others'.

The measure is the median absolute deviation (MAD): unlike mean and standard deviation it is not moved by the outliers
that it looks for, as long as they are less than half (Leys et al. 2013, doi 10.1016/j.jesp.2013.03.013, equation 1).
"""

from collections.abc import Mapping
from statistics import median

NORMAL = 1.4826
"""1.4826 MAD is the standard deviation of normally distributed values."""

LEAST_SPREAD = 0.05
"""Of the median: norms that agree to a few per cent must not make the next one an outlier."""


def unusual_norms(norms: Mapping[str, float], *, most_deviations: float, min_updates: int) -> dict[str, str]:
    """Return the keys whose norm is far from the median, each with a reason in words.

    Far is `|n - median| > most_deviations * max(1.4826 MAD, 0.05 median)`. At least half of the updates are never far.

    Args:
        norms: L2 norm of each update, finite.
        most_deviations: at least 1.
        min_updates: with fewer, nothing is far.
    """
    if len(norms) < min_updates:
        return {}
    middle = median(norms.values())
    spread = max(NORMAL * median(abs(norm - middle) for norm in norms.values()), LEAST_SPREAD * middle)
    most = most_deviations * spread
    return {
        key: f"expected a norm within {most:.3g} of the median {middle:.3g} of the round's {len(norms)} updates, "
        f"got {norm:.3g}"
        for key, norm in norms.items()
        if abs(norm - middle) > most
    }
