"""Seconds: medians, and variants in turn so that a noisy machine is equally noisy to all."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

Call = Callable[[], Any]


def seconds_of(call: Call) -> float:
    """One call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def median_seconds(call: Call, *, least: float, calls: int = 5) -> float:
    """The median of at least `calls` calls and `least` seconds, after one that does not count."""
    call()
    taken: list[float] = []
    while len(taken) < calls or sum(taken) < least:
        taken.append(seconds_of(call))
    return statistics.median(taken)


def in_turn(
    variants: Mapping[str, Call], *, rounds: int, advance: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each variant, one call of each in every round, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, call in variants.items():
            seconds = seconds_of(call)
            if number:
                taken[name].append(seconds)
            advance()
    return taken


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """How many times faster, round by round: lower quartile, median, upper quartile."""
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high
