"""Means over seeds, and differences paired by seed."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dynamixer.errors import UserError, install

CONFIDENCE = 0.95


class Spread(NamedTuple):
    """Mean and standard deviation (n - 1) of n seeds; one seed has no deviation."""

    mean: float
    deviation: float | None
    seeds: int


class Difference(NamedTuple):
    """The mean difference of pairs, its 95 % interval and the p-value of the paired t-test; one pair has only the first."""

    mean: float
    low: float | None
    high: float | None
    p: float | None
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves out zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


def spread(values: Sequence[float]) -> Spread:
    """Of one or more values."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Ours less theirs over the seeds that both have, or None where there are none.

    Raises:
        UserError: scipy is not installed.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.fmean(differences)
    if len(seeds) == 1:
        return Difference(mean, None, None, None, 1)
    if statistics.stdev(differences) < 1e-9:  # nothing to test: all pairs say the same
        return Difference(mean, mean, mean, float(abs(mean) < 1e-9), len(seeds))
    try:
        from scipy.stats import ttest_rel  # noqa: PLC0415 - an extra
    except ImportError:
        raise UserError(f"the paired tests need scipy: {install('evidence')}") from None
    found = ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    interval = found.confidence_interval(CONFIDENCE)
    return Difference(mean, float(interval.low), float(interval.high), float(found.pvalue), len(seeds))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number by Holm's method (1979), in the order given."""
    corrected, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = least
    return corrected
