"""Means and paired differences over seeds, with Student's t intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its interval.

    `half` is None with fewer than two values: one run says nothing about the spread between seeds.
    """

    mean: float
    half: float | None
    count: int

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

    half = t(1 - (1 - confidence) / 2, n - 1) * s / sqrt(n), s the sample standard deviation.
    """
    known = [value for value in values if value is not None and math.isfinite(value)]
    count = len(known)
    if count == 0:
        return None
    mean = math.fsum(known) / count
    if count == 1:
        return Interval(mean, None, 1)
    variance = math.fsum((value - mean) ** 2 for value in known) / (count - 1)
    quantile = float(stdtrit(count - 1, 0.5 + confidence / 2))
    return Interval(mean, quantile * math.sqrt(variance / count), count)


def paired_difference(
    values: Mapping[int, float | None], baseline: Mapping[int, float | None], confidence: float = CONFIDENCE
) -> Interval | None:
    """The mean of value - baseline over the seeds that both have, with its t interval.

    Pairing by seed removes what two runs of one seed share (initialisation, order of the samples).
    """
    pairs = [(values[seed], baseline[seed]) for seed in sorted(values) if seed in baseline]
    return mean_interval([a - b for a, b in pairs if a is not None and b is not None], confidence)
