"""The registry of experiments."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

Run: TypeAlias = "Callable[..., pd.DataFrame]"
Plot: TypeAlias = "Callable[..., Figure]"


class Experiment(NamedTuple):
    """A function of a model and records, the figure of its table, and its question.

    Attributes:
        run: The function.
        plot: The function that draws its figure.
        about: Its place in the paper, or that the paper leaves it open.
        question: The question that the table answers.
        options: Its own arguments that a report fills in: ``"texts"``, ``"jacobian_lens"``.
        resumes: Whether it takes ``path``, a folder of rows to resume from.
    """

    run: Run
    plot: Plot
    about: str
    question: str
    options: tuple[str, ...] = ()
    resumes: bool = True


EXPERIMENTS: dict[str, Experiment] = {}
"""The experiments by name, in report order. ``many_edits`` and ``translator_ranks`` need a choice
beforehand."""


def figure_of(
    run: Run, about: str, question: str, *, options: tuple[str, ...] = (), resumes: bool = True
) -> Callable[[Plot], Plot]:
    """Register an experiment and its figure, drawn by the decorated function.

    Args:
        run: The experiment: a function of a model and records that returns a table.
        about: As in :class:`Experiment`.
        question: The same.
        options: The same.
        resumes: The same.

    Example:
        >>> @figure_of(gradient_rank, "Fig 3", "Does the rank grow with the prompt?")
        ... def plot_gradient_rank(frame): ...
    """

    def register(plot: Plot) -> Plot:
        EXPERIMENTS[run.__name__] = Experiment(run, plot, about, question, options, resumes)
        return plot

    return register
