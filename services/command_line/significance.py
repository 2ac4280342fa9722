"""What a difference between two shares on so many rows can carry."""

import math
from dataclasses import dataclass

NORMAL_95 = 1.959964
"""Two-sided 95% quantile of the normal distribution."""


@dataclass(frozen=True)
class Difference:
    """A difference of exact-match scores, in points of a hundred, with a 95% interval."""

    points: float
    low: float
    high: float
    num_rows: int

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero: these rows can tell the difference from chance."""
        return self.low > 0 or self.high < 0


def difference(before: float, after: float, num_rows: int) -> Difference:
    """Return `after - before` of two exact-match scores (0-100) on the same `num_rows` rows.

    The interval is that of Agresti and Caffo (The American Statistician 54, 2000) for two independent shares: one
    success and one failure are added to each. Which rows were right is not known here, only how many; on the same rows
    two models usually fail alike, and then the interval is wider than a paired one would be: it errs towards "no
    difference".
    """
    shares = [(score / 100 * num_rows + 1) / (num_rows + 2) for score in (before, after)]
    half = NORMAL_95 * math.sqrt(sum(share * (1 - share) / (num_rows + 2) for share in shares))
    middle = shares[1] - shares[0]
    return Difference(after - before, 100 * (middle - half), 100 * (middle + half), num_rows)
