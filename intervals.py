"""
The mean of paired differences and its 95 % interval, by Student's t.

    >>> interval([1.0, 2.0, 3.0])
    Difference(mean=2.0, half=2.484..., n=3)
"""

import math
import statistics
from typing import NamedTuple


def t_probability(t, df):
    """P(|T| < t) for Student's t with df = 1, 2 .. degrees of freedom.

    Abramowitz and Stegun, 26.7.3 and 26.7.4: a finite sum, in the angle atan(t / sqrt(df)).
    """
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if df % 2 else (1.0, 0.0)
    for k in range(3 if df % 2 else 2, df + 1, 2):
        total += term
        term *= cosine**2 * (k - 1) / k
    return 2 / math.pi * (angle + sine * total) if df % 2 else sine * total


def t_quantile(df, level=0.95):
    """The t with P(|T| < t) = level, by bisection."""
    low, high = 0.0, 1.0
    while t_probability(high, df) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, df) < level else (low, middle)
    return high


class Difference(NamedTuple):
    mean: float | None  # None without a pair
    half: float | None  # of the 95 % interval mean - half .. mean + half; None with one pair
    n: int  # pairs

    def leaves_out_0(self):
        """Whether there is an interval, and 0 is outside of it."""
        return self.half is not None and abs(self.mean) > self.half

    def bound(self):
        """The largest absolute difference in the interval; None without one."""
        return None if self.half is None else abs(self.mean) + self.half


def interval(differences):
    """The mean of the differences, one for each seed, and its 95 % interval by Student's t.

    -> Difference; its `half` is None with fewer than two differences, its mean too with none."""
    n = len(differences)
    if n < 2:
        return Difference(differences[0] if n else None, None, n)
    error = statistics.stdev(differences) / math.sqrt(n)
    return Difference(statistics.fmean(differences), t_quantile(n - 1) * error, n)
