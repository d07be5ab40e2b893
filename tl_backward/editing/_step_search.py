"""Search for the smallest step at which an edit succeeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

EXPONENTS = range(-6, 10)
"""Powers of two to try first, in one batch, in units of the guess."""
N_PARTS, N_ROUNDS = 9, 2
"""Number of parts of a divided interval, and number of divisions."""
LEAST_EXPONENT = -48


class Step(NamedTuple):
    """A step and its gap; it succeeds if the gap reaches the margin."""

    size: float
    gap: float


def smallest_step(
    gaps: Callable[[Sequence[float]], Sequence[float]], guess: float, margin: float
) -> Step:
    """The smallest step with a gap of at least ``margin``, to about 1 %.

    The search tries powers of two first, from ``2^-6`` to ``2^9`` times the guess, then smaller
    ones if all succeed, or the neighbourhood of the best if none succeeds. It then divides the
    interval below the first success. It may miss a smaller step if success is not monotonic on this
    scale.

    Args:
        gaps: Computes the gaps of several steps at once.
        guess: A step that adds as much as the output already has.
        margin: The gap to reach.

    Returns:
        The step; if none succeeds, the one with the largest gap.
    """
    tried: list[Step] = []

    def attempt(sizes: Sequence[float]) -> Step | None:
        steps = [Step(size, gap) for size, gap in zip(sizes, gaps(sizes), strict=True)]
        tried.extend(steps)
        return next((step for step in steps if step.gap >= margin), None)

    def divide(below: float, above: float) -> Step | None:
        width = (above - below) / N_PARTS
        return attempt([below + i * width for i in range(1, N_PARTS)])

    exponents = EXPONENTS
    found = attempt([guess * 2.0**k for k in exponents])
    while found == tried[-len(exponents)] and exponents.start > LEAST_EXPONENT:
        exponents = range(exponents.start - len(exponents), exponents.start)
        found = attempt([guess * 2.0**k for k in exponents]) or found
    for _ in range(N_ROUNDS):
        if found is None:
            best = max(tried, key=lambda step: step.gap)
            below = max((step.size for step in tried if step.size < best.size), default=0.0)
            above = min((step.size for step in tried if step.size > best.size), default=best.size)
            found = divide(below, above)
    if found is None:
        return max(tried, key=lambda step: step.gap)
    for _ in range(N_ROUNDS):
        below = max((step.size for step in tried if step.size < found.size), default=0.0)
        found = divide(below, found.size) or found
    return found
