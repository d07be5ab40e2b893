"""The HTML page of several experiments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tl_backward.plotting.page import environment

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Chapter:
    """One experiment of a report.

    Attributes:
        name: Name of the experiment.
        about: Its subject, with reference to the paper.
        figure: Its figure.
        seconds: Run time in seconds.
        n_rows: Number of rows of its table.
    """

    name: str
    about: str
    figure: Figure
    seconds: float
    n_rows: int


def report_page(title: str, chapters: Sequence[Chapter]) -> str:
    """One self-contained page with the figures of several experiments; embeds plotly once.

    Raises:
        ImportError: Without the extra ``plot``.
    """
    figures = [
        chapter.figure.to_html(full_html=False, include_plotlyjs=i == 0, default_width="100%")
        for i, chapter in enumerate(chapters)
    ]
    return (
        environment()
        .get_template("report.html.j2")
        .render(title=title, chapters=list(zip(chapters, figures, strict=True)))
    )
