"""Plotly figures of lens results."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import torch

from tl_backward.plotting.tables import Cell, LensTables, Table
from tl_backward.plotting.tokens import visible

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LIGHT_TO_BLUE = [[0, "#f3f6f9"], [1, "#74aee6"]]
"""Dark text is readable on every colour in between."""
TEXT = "#16202b"
SCALE = {"title": "norm, cube root,<br>largest = 1"}
ROW_HEIGHT, COLUMN_WIDTH, MARGIN = 34, 104, 120
TITLES, BOTTOM = 90, 40
"""Heights in pixels: the titles of a figure and its panels, and the bottom margin."""
LEVEL, UPRIGHT = 0, -90
NAME_HEIGHT = {LEVEL: 24, UPRIGHT: 100}
"""Height of the column names in pixels, by angle."""
SHOWN_CHARACTERS = 10


def lens_figure(shown: LensTables, kind: str, weight: str) -> Figure:
    """The figure of one kind; see :meth:`BackwardLensResult.plot`."""
    require_plotly()
    if kind not in ("table", "ranks", "norms", "forward_and_backward"):
        raise ValueError(
            f"kind must be 'table', 'ranks', 'norms' or 'forward_and_backward', got {kind!r}"
        )
    if kind == "norms":
        return _norms(shown, list(shown.tables.values()))
    if weight not in shown.tables:
        raise KeyError(f"{weight!r} was not read; available: {', '.join(shown.tables)}")
    table = shown.tables[weight]
    if kind == "ranks":
        return _ranks(shown, table)
    if kind == "table":
        return _tables(shown, [table])
    if "forward" not in shown.tables:
        raise ValueError("kind='forward_and_backward' needs a lens run with forward=True")
    return _tables(shown, [shown.tables["forward"], table])


def require_plotly() -> None:
    """Say what to install.

    Raises:
        ImportError: Without the extra ``plot``.
    """
    try:
        import plotly.graph_objects  # noqa: F401
    except ImportError as error:
        raise ImportError("figures need plotly: pip install 'tl-backward[plot]'") from error


def _tables(shown: LensTables, tables: list[Table]) -> Figure:
    """Layer x token tables, side by side."""
    figure = _panels(tables)
    for column, table in enumerate(tables, start=1):
        headers, rows = zip(*table.rows(), strict=True)
        figure.add_heatmap(
            x=_columns(table),
            y=headers,
            z=[[cell.level if cell else None for cell in row] for row in rows],
            text=[[_short(table, cell) if cell else "" for cell in row] for row in rows],
            customdata=[
                [
                    _details(shown, table, header, j, cell) if cell else "no update: exactly zero"
                    for j, cell in enumerate(row)
                ]
                for header, row in zip(headers, rows, strict=True)
            ],
            texttemplate="%{text}",
            textfont={"size": 11, "color": TEXT},
            hovertemplate="%{customdata}<extra></extra>",
            hoverongaps=False,
            zmin=0,
            zmax=1,
            colorscale=LIGHT_TO_BLUE,
            showscale=column == len(tables),
            colorbar=SCALE,
            xgap=1,
            ygap=1,
            row=1,
            col=column,
        )
    hover = {"align": "left", "bgcolor": "#ffffff", "font": {"family": "monospace", "color": TEXT}}
    return _laid_out(shown, figure, tables, COLUMN_WIDTH, LEVEL).update_layout(hoverlabel=hover)


def _norms(shown: LensTables, tables: list[Table]) -> Figure:
    """The norm of every vector, scaled per table."""
    figure = _panels(tables)
    for column, table in enumerate(tables, start=1):
        norms = torch.tensor(table.norms[::-1], dtype=torch.float64)
        figure.add_heatmap(
            x=_columns(table),
            y=table.headers[::-1],
            z=(norms / norms.max()).where(norms > 0, torch.nan).pow(1 / 3).tolist(),
            customdata=norms.tolist(),
            colorscale="Blues",
            showscale=column == len(tables),
            colorbar=SCALE,
            hovertemplate="%{y}, %{x}: norm %{customdata:.4g}<extra></extra>",
            hoverongaps=False,
            row=1,
            col=column,
        )
    return _laid_out(shown, figure, tables, COLUMN_WIDTH // 2, UPRIGHT)


def _ranks(shown: LensTables, table: Table) -> Figure:
    """The rank of each target by layer, one line per position."""
    import plotly.graph_objects as go

    if not shown.has_targets:
        raise ValueError("kind='ranks' needs a lens run with a target or targets=")
    figure = go.Figure()
    for j, column in enumerate(_columns(table)):
        for t, target in enumerate(table.targets[j]):
            ranks = [entry[j][t] for entry in table.ranks]
            figure.add_scatter(
                x=table.headers,
                y=[rank if rank >= 0 else None for rank in ranks],
                name=f"{column} → {escaped(target)}",
                mode="lines+markers",
                visible=True if j == len(table.positions) - 1 else "legendonly",
            )
    last = shown.d_vocab - 1
    figure.update_yaxes(
        title=f"rank: 0 {table.ends[0]}, {last} {table.ends[1]} probable",
        range=[1.03 * last, -0.03 * last],
    )
    figure.update_xaxes(title="layer" if table.is_weight else None, type="category")
    return figure.update_layout(
        template="plotly_white", title=f"Rank of the target in {table.kind}", showlegend=True
    )


def _panels(tables: list[Table]) -> Figure:
    from plotly.subplots import make_subplots

    return make_subplots(1, len(tables))


def _laid_out(
    shown: LensTables, figure: Figure, tables: list[Table], column_width: int, angle: int
) -> Figure:
    """Put column names on top and panel names at the left, where a wide figure begins."""
    n_columns = sum(len(table.positions) for table in tables)
    figure.update_xaxes(side="top", tickangle=angle, type="category", ticks="", showgrid=False)
    figure.update_yaxes(autorange="reversed", type="category", ticks="", showgrid=False)
    for column, table in enumerate(tables, start=1):
        figure.add_annotation(
            text=f"<b>{table.kind}</b>",
            x=0,
            xref="x domain",
            xanchor="left",
            y=1,
            yref="y domain",
            yanchor="bottom",
            yshift=NAME_HEIGHT[angle],
            showarrow=False,
            row=1,
            col=column,
        )
    top = TITLES + NAME_HEIGHT[angle]
    aim = "" if shown.loss_target is None else f" → {escaped(shown.loss_target)}"
    return figure.update_layout(
        template="plotly_white",
        title={
            "text": f"Backward lens{aim}, loss {shown.loss:.4f}",
            "x": 0,
            "xref": "paper",
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 20},
        },
        margin={"t": top, "b": BOTTOM},
        width=max(480, n_columns * column_width + 2 * MARGIN + 60 * (len(tables) - 1)),
        height=max(len(table.headers) for table in tables) * ROW_HEIGHT + top + BOTTOM,
    )


def _columns(table: Table) -> list[str]:
    """Unique names of the positions, so that equal tokens get separate columns."""
    return [
        f"{clipped(token)} {position}"
        for token, position in zip(table.tokens, table.positions, strict=True)
    ]


def _short(table: Table, cell: Cell) -> str:
    """The outermost tokens; the one that a step moves towards is bold if it is the target."""
    ends = [clipped(cell.top[0][0]), clipped(cell.bottom[0][0])]
    if cell.is_hit:
        counts = 0 if table.top_counts else 1
        ends[counts] = f"<b>{ends[counts]}</b>"
    return " \\<br>".join(ends)


def _details(shown: LensTables, table: Table, header: str, j: int, cell: Cell) -> str:
    where = f"layer {header}" if table.is_weight else header
    value = shown.value.replace("_", " ")
    lines: list[Any] = [
        f"<b>{where}, {escaped(table.tokens[j])} at {table.positions[j]}</b>",
        f"norm {cell.norm:.3g}, of the VJP {cell.vjp_norm:.3g}"
        if table.is_weight
        else f"norm {cell.norm:.3g}",
    ]
    lines += [
        f"target {escaped(target)}: rank {rank} of {shown.d_vocab}" for target, rank in cell.ranks
    ]
    if cell.experts:
        lines.append("experts " + ", ".join(f"{e} ({weight:.2g})" for e, weight in cell.experts))
    for end, tokens in zip(table.ends, (cell.top, cell.bottom), strict=True):
        lines.append(f"<b>{end} probable</b> ({value})")
        lines += [f"{number:.3g} {escaped(token)}" for token, number in tokens]
    return "<br>".join(lines)


def clipped(token: str) -> str:
    """A token as a short label."""
    shown = visible(token)
    whole = len(shown) <= SHOWN_CHARACTERS
    return _text(shown if whole else shown[: SHOWN_CHARACTERS - 1] + "…")


def escaped(token: str) -> str:
    """A token as a label of plotly's."""
    return _text(visible(token))


def _text(shown: str) -> str:
    """A visible token, escaped for a plotly label, where ``<b>`` is markup.

    Isolating it keeps a right-to-left token from reordering the rest of the label.
    """
    return f"\u2068{html.escape(shown, quote=False)}\u2069"
