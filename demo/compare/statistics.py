"""Means over seeds with Student's t intervals, and how fast a training converges."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95
MOST_SMOOTHED = 10


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided 95 % confidence interval; ``low`` and ``high`` are None for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def above_zero(self) -> bool:
        """True if the whole interval is."""
        return self.low is not None and self.low > 0

    @property
    def below_zero(self) -> bool:
        """True if the whole interval is."""
        return self.high is not None and self.high < 0


def interval(values: Sequence[float]) -> Interval:
    """mean ± t·s/√n, with s the sample's standard deviation and t the quantile of n - 1 degrees of freedom.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("values: found none, expected at least one")
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, None, None, 1)
    half = t_quantile(CONFIDENCE, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


def paired_difference(values: Sequence[float], baseline: Sequence[float]) -> Interval:
    """The interval of values[i] - baseline[i]: what both owe to the seed i, its split above all, cancels.

    Raises:
        ValueError: not as many of one as of the other.
    """
    if len(values) != len(baseline):
        raise ValueError(f"baseline: found {len(baseline)} values, expected {len(values)}, one for each of the others")
    return interval([value - other for value, other in zip(values, baseline, strict=True)])


def t_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = ``confidence`` for Student's distribution of ``degrees`` degrees of freedom.

    Raises:
        ValueError: ``confidence`` is not between 0 and 1, or ``degrees`` is below 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: found {confidence}, expected a number above 0 and below 1")
    if degrees < 1:
        raise ValueError(f"degrees: found {degrees}, expected at least 1")
    quantile: float = student.ppf(0.5 + confidence / 2, degrees)
    return quantile


def smoothing_window(steps: int) -> int:
    """Steps over which the training loss is averaged: a sixth of the training, ten at most."""
    return max(1, min(MOST_SMOOTHED, steps // 6))


def steps_to_level(losses: Sequence[float], level: float) -> int | None:
    """The first step, counted from 1, after which the mean of the last losses is at most ``level``; None if none is.

    The mean is over `smoothing_window` steps, so no earlier step can be the answer.
    """
    window = smoothing_window(len(losses))
    for step in range(window, len(losses) + 1):
        if statistics.fmean(losses[step - window : step]) <= level:
            return step
    return None


def mean_loss(losses: Sequence[float]) -> float:
    """The area under the training loss over the number of steps: less is earlier and lower."""
    return statistics.fmean(losses)
