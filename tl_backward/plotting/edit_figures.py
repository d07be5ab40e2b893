"""Plotly figures of what an edit adds: layers x weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_backward.plotting.edit_tables import EditCell, EditTable
from tl_backward.plotting.figures import (
    BOTTOM,
    COLUMN_WIDTH,
    LIGHT_TO_BLUE,
    MARGIN,
    ROW_HEIGHT,
    SCALE,
    TEXT,
    TITLES,
    clipped,
    escaped,
    require_plotly,
)
from tl_backward.plotting.page import environment

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LEGEND = (
    "Each cell is a weight: the outermost tokens of the leading singular direction of what was "
    "added to it, top \\ bottom, coloured by norm. The two ends go with opposite inputs; the "
    "feature named when you point at a cell is positive for the top. Weights that write to the "
    "residual stream (W_out, W_O) move it towards the tokens; those that read it (W_in, W_gate, "
    "W_Q, W_K, W_V) respond to them."
)


def edit_figure(table: EditTable, title: str = "What the edit adds") -> Figure:
    """The table as a figure; more tokens and directions show when a cell is pointed at.

    Raises:
        ImportError: Without the extra ``plot``.
    """
    require_plotly()
    import plotly.graph_objects as go

    figure = go.Figure(go.Heatmap(**heatmap_of(table, table.headers, table.weights)))
    return laid_out(figure, title, len(table.headers), len(table.weights))


def heatmap_of(table: EditTable, headers: list[str], weights: list[str]) -> dict[str, Any]:
    """The arguments of the heat map of a table, with these rows and columns."""
    rows = [[table.cell(header, weight) for weight in weights] for header in headers]
    return {
        "x": weights,
        "y": headers,
        "z": [[table.level(cell) if cell else None for cell in row] for row in rows],
        "text": [[_short(cell) if cell else "" for cell in row] for row in rows],
        "customdata": [
            [_details(cell) if cell else "nothing added" for cell in row] for row in rows
        ],
        "texttemplate": "%{text}",
        "textfont": {"size": 11, "color": TEXT},
        "hovertemplate": "%{customdata}<extra></extra>",
        "hoverongaps": False,
        "zmin": 0,
        "zmax": 1,
        "colorscale": LIGHT_TO_BLUE,
        "colorbar": SCALE,
        "xgap": 1,
        "ygap": 1,
    }


def laid_out(figure: Figure, title: str, n_rows: int, n_columns: int) -> Figure:
    """Columns named on top, the last layer first."""
    figure.update_xaxes(side="top", type="category", ticks="", showgrid=False)
    figure.update_yaxes(autorange="reversed", type="category", ticks="", showgrid=False)
    return figure.update_layout(
        template="plotly_white",
        title={"text": title, "x": 0, "xref": "paper", "y": 1, "yanchor": "top", "pad": {"t": 20}},
        margin={"t": TITLES, "b": BOTTOM},
        width=max(480, 2 * n_columns * COLUMN_WIDTH + 2 * MARGIN),
        height=n_rows * ROW_HEIGHT + TITLES + BOTTOM,
        hoverlabel={
            "align": "left",
            "bgcolor": "#ffffff",
            "font": {"family": "monospace", "color": TEXT},
        },
    )


def edit_page(table: EditTable, title: str = "What the edit adds") -> str:
    """One self-contained page with the figure.

    Raises:
        ImportError: Without the extra ``plot``.
    """
    return figure_page(title, LEGEND, edit_figure(table, ""))


def figure_page(title: str, text: str, figure: Figure) -> str:
    """One self-contained page with a figure and a paragraph above it.

    Raises:
        ImportError: Without the extra ``plot``.
    """
    shown = figure.to_html(full_html=False, include_plotlyjs=True)
    return environment().get_template("figure.html.j2").render(title=title, text=text, figure=shown)


def _short(cell: EditCell) -> str:
    if not cell.readings:
        return ""
    return f"{clipped(cell.readings[0].top[0])} \\ {clipped(cell.readings[0].bottom[0])}"


def _details(cell: EditCell) -> str:
    lines = [f"<b>{cell.weight}, {cell.header}</b>: norm {cell.norm:.3g}"]
    for i, one in enumerate(cell.readings):
        lines.append(f"<b>direction {i}</b>: {one.share:.0%} of it; {escaped(one.feature)}")
        for sign, tokens in (("+", one.top), ("-", one.bottom)):
            lines.append(f"{sign} {' '.join(map(escaped, tokens))}")
    return "<br>".join(lines)
