"""Means and paired differences over seeds, with Student's t intervals and tests."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# scipy.stats takes 0.9 s of CPU longer to import than these two functions of the t distribution; it has no correction
# after Holm, and its t-test gives no p for values that are all zero.
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
LEVEL = 0.05  # below which a corrected p counts
TESTED = 3  # values from which on a test is made: with two, next to nothing is known of their spread


@dataclass(frozen=True)
class Interval:
    """A mean over seeds, the half-width of its interval, and p of the t-test of the mean against zero.

    `half` is None with fewer than two values: one run says nothing about the spread between seeds. `p` is None with
    fewer than TESTED.
    """

    mean: float
    half: float | None
    count: int
    p: float | None = None

    @property
    def low(self) -> float:
        """Lower end; the mean itself where there is no interval."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end; the mean itself where there is no interval."""
        return self.mean + (self.half or 0.0)

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes zero."""
        return self.half is not None and not self.low <= 0.0 <= self.high


def mean_interval(values: Sequence[float | None], confidence: float = CONFIDENCE) -> Interval | None:
    """The mean of the values that are numbers, with its two-sided t interval; None where there is none.

    half = t(1 - (1 - confidence) / 2, n - 1) * s / sqrt(n), s the sample standard deviation. p is two-sided; of equal
    values it is 0, or 1 where they are zero.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    count = len(known)
    if count == 0:
        return None
    mean = math.fsum(known) / count
    if count == 1:
        return Interval(mean, None, 1)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (count - 1) / count)
    quantile = float(stdtrit(count - 1, 0.5 + confidence / 2))
    return Interval(mean, quantile * error, count, _p(mean, error, count) if count >= TESTED else None)


def _p(mean: float, error: float, count: int) -> float:
    """Two-sided, of a mean with a standard error."""
    if error == 0:
        return float(mean == 0)
    return 2 * float(stdtr(count - 1, -abs(mean) / error))


def holm(tests: Sequence[float | None]) -> list[float | None]:
    """The p values of one family, corrected after Holm; None, a test that was not made, stays so.

    From the smallest on, each is multiplied by the number of those not below it, and is not below the one before it.
    """
    corrected: list[float | None] = [None] * len(tests)
    least, made = 0.0, sorted((p, place) for place, p in enumerate(tests) if p is not None)
    for left, (p, place) in zip(range(len(made), 0, -1), made, strict=True):
        least = max(least, min(1.0, p * left))
        corrected[place] = least
    return corrected


def paired_difference(
    values: Mapping[int, float | None], baseline: Mapping[int, float | None], confidence: float = CONFIDENCE
) -> Interval | None:
    """The mean of value - baseline over the seeds that both have, with its t interval.

    Pairing by seed removes what two runs of one seed share (initialisation, order of the samples).
    """
    pairs = [(values[seed], baseline[seed]) for seed in sorted(values) if seed in baseline]
    return mean_interval([a - b for a, b in pairs if a is not None and b is not None], confidence)
