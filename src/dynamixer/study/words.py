"""How the page writes figures."""

import statistics
from collections.abc import Iterable, Mapping, Sequence

from dynamixer.study.results import Results
from dynamixer.study.rows import Run
from dynamixer.study.statistics import Difference, Spread

NOTHING = "\N{EN DASH}"
NOT_RUN = "not run"


def signed(value: float, digits: int = 2) -> str:
    """With its sign."""
    return f"{value:+.{digits}f}"


def spread_text(found: Spread | None, digits: int = 2) -> str:
    """Mean, deviation, and the number of seeds."""
    if found is None:
        return NOT_RUN
    deviation = "" if found.deviation is None else f" ± {found.deviation:.{digits}f}"
    return f"{found.mean:.{digits}f}{deviation} ({found.seeds})"


def interval_text(d: Difference) -> str:
    """A difference with its interval, where it has one."""
    return (
        signed(d.mean) if d.low is None or d.high is None else f"{signed(d.mean)} [{signed(d.low)}, {signed(d.high)}]"
    )


def common(every: Iterable[Mapping[int, float]]) -> str:
    """In words, how many seeds all of these have."""
    count = len(set.intersection(*map(set, every)))
    return "the one seed that all have" if count == 1 else f"the {count} seeds that all have"


def in_order(every: Mapping[str, Mapping[int, float]]) -> str:
    """Labels with their means, the largest first, over the seeds that all have; none where there is no such seed."""
    seeds = set.intersection(*map(set, every.values())) if every else set()
    means = {label: statistics.fmean(found[seed] for seed in seeds) for label, found in every.items() if seeds}
    return ", ".join(f"{label} {mean:.2f}" for label, mean in sorted(means.items(), key=lambda pair: -pair[1]))


def markdown(head: Sequence[object], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [[str(cell) for cell in head], ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def share_of(results: Results, every: Iterable[Run]) -> tuple[int, int]:
    """How many of these runs are finished, and how many there are."""
    wanted = list(every)
    return sum(results.has(run, "runs") for run in wanted), len(wanted)
