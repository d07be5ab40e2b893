"""Changes that are undone whatever happens, even after repeated interrupts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

ATTEMPTS = 3
"""Number of attempts at a step that an interrupt or an error cuts short."""


class Undo:
    """Steps that undo changes to a model, run in reverse order when the context exits.

    Add a step *before* the change that it undoes; it must be harmless if it runs twice or if the
    change was never made. An interrupt during a step is raised after all steps are done.

    An interrupt may also arrive before the first instruction of ``__exit__``. So enter the context
    several times, ``with Undo() as undo, undo, undo:``. The first exit that runs undoes everything,
    and the others have nothing left to do.
    """

    def __init__(self) -> None:
        self.steps: list[Callable[[], object]] = []

    def add(self, step: Callable[..., object], *arguments: Any) -> None:
        """Add the step that undoes the next change."""
        self.steps.append(partial(step, *arguments))

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *exc: object) -> None:
        take_back(self.steps)


def take_back(steps: list[Callable[[], object]]) -> None:
    """Run and remove steps in reverse order.

    Raises:
        BaseException: The last interrupt or error during a step, if any.
    """
    interrupt = None
    while steps:
        step = steps[-1]
        for _ in range(ATTEMPTS):
            try:
                step()
                break
            except BaseException as error:
                interrupt = error
        with suppress(ValueError):  # another thread may have removed it
            steps.remove(step)
    try:
        if interrupt is not None:
            raise interrupt
    finally:
        del interrupt
