"""Plotly figures of a training run: what was written, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tl_backward.plotting.edit_figures import LEGEND, figure_page, heatmap_of, laid_out
from tl_backward.plotting.edit_tables import EditTable
from tl_backward.plotting.figures import require_plotly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PANELS = ("written since the last look", "a step would write")
SLIDER = 90


class WatchStep(NamedTuple):
    """One look at a training run.

    Attributes:
        step: When.
        loss: Mean loss of the probes.
        written: What was written since the last look, if anything.
        would_write: What a step down the gradient of the probes would write, if anything.
    """

    step: int
    loss: float
    written: EditTable | None
    would_write: EditTable | None


def watch_figure(steps: Sequence[WatchStep], title: str = "What training writes") -> Figure:
    """Both tables of a look side by side, with a slider over the looks.

    Raises:
        ImportError: Without the extra ``plot``.
        ValueError: When there are no looks.
    """
    require_plotly()
    from plotly.subplots import make_subplots

    if not steps:
        raise ValueError("nothing was seen yet; call observe() first")
    tables = [table for step in steps for table in step[2:] if table is not None]
    whole = EditTable([cell for table in tables for cell in table.cells])
    headers, weights = whole.headers, whole.weights
    figure = make_subplots(1, 2, subplot_titles=PANELS, shared_yaxes=True)
    for i, step in enumerate(steps):
        for column, table in enumerate(step[2:], start=1):
            cells = heatmap_of(table or EditTable([]), headers, weights)
            figure.add_heatmap(
                **cells, showscale=column == 2, visible=i == len(steps) - 1, row=1, col=column
            )
    laid_out(figure, title, len(headers), 2 * len(weights))
    figure.update_layout(
        sliders=[
            {
                "active": len(steps) - 1,
                "currentvalue": {"prefix": "step "},
                "pad": {"t": 20},
                "steps": [
                    {
                        "label": str(step.step),
                        "method": "update",
                        "args": [
                            {"visible": [j // 2 == i for j in range(2 * len(steps))]},
                            {"title.text": f"{title}: step {step.step}, loss {step.loss:.4f}"},
                        ],
                    }
                    for i, step in enumerate(steps)
                ],
            }
        ],
        height=figure.layout.height + SLIDER,
    )
    return figure


def watch_page(steps: Sequence[WatchStep], title: str = "What training writes") -> str:
    """One self-contained page with the figure.

    Raises:
        ImportError: Without the extra ``plot``.
        ValueError: When there are no looks.
    """
    return figure_page(title, LEGEND, watch_figure(steps))
