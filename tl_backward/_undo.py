"""Changes that are taken back whatever happens, also when an interrupt cuts in more than once."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

ATTEMPTS = 3
"""How often a step is tried that an interrupt, or an error, has cut short."""


class Undo:
    """Steps that take changes to a model back, run last first when its context exits.

    A step is added *before* the change that it takes back, and does no harm when it runs twice or
    when the change was never made. An interrupt during a step is raised when all steps are done.

    An interrupt may also come when a context is left and before the first instruction of its
    ``__exit__``. So enter it several times, ``with Undo() as undo, undo, undo:``; the first exit
    that gets to run does everything, and the others find nothing left to do.
    """

    def __init__(self) -> None:
        self.steps: list[Callable[[], object]] = []

    def add(self, step: Callable[..., object], *arguments: Any) -> None:
        """Add the step that takes back the change that comes next."""
        self.steps.append(partial(step, *arguments))

    def __enter__(self) -> Undo:
        return self

    def __exit__(self, *exc: object) -> None:
        take_back(self.steps)


def take_back(steps: list[Callable[[], object]]) -> None:
    """Run steps, last first, and remove them.

    Raises:
        BaseException: What came in between, if anything did.
    """
    cut_in = None
    while steps:
        step = steps[-1]
        for _ in range(ATTEMPTS):
            try:
                step()
                break
            except BaseException as error:
                cut_in = error
        with suppress(ValueError):  # another thread has removed it
            steps.remove(step)
    try:
        if cut_in is not None:
            raise cut_in
    finally:
        del cut_in
