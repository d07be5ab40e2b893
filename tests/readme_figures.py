"""The README's figures, from what ``reproduce`` and ``make bench`` have written.

``python tests/readme_figures.py REPORT_FOLDER BENCH_JSON`` writes them as PNG files into ``demos``;
it needs Chromium.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import plotly.io
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from tl_backward.analysis import plot_smallest_edit, plot_target_rank

DEMOS = Path(__file__).parents[1] / "demos"
WIDTH, HEIGHT = 900, 420


def target_rank(report: Path) -> Figure:
    """Rank of the target by layer and segment."""
    return plot_target_rank(pd.read_parquet(report / "target_rank.parquet"))


def smallest_edit(report: Path) -> Figure:
    """Norm of the smallest edit that succeeds, by layer and method."""
    return plot_smallest_edit(pd.read_parquet(report / "smallest_edit.parquet"))


def growth(bench: Path) -> Figure:
    """Time and memory of a capture, and the floor's time, by tokens, prompts and layers."""
    rows = pd.DataFrame(json.loads(bench.read_text())).query("section == 'growth'")
    axes = list(rows["axis"].unique())
    names = {"ms": "capture, ms", "floor, ms": "floor, ms", "the cache, MiB": "the cache, MiB"}
    figure = make_subplots(1, len(axes), subplot_titles=axes)
    colours = dict(zip(names, ("#1f77b4", "#9aa5b1", "#d62728"), strict=True))
    for column, axis in enumerate(axes, start=1):
        for key, name in names.items():
            of_axis = rows[rows["axis"] == axis]
            figure.add_scatter(
                x=of_axis["size"],
                y=of_axis[key],
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                line={"color": colours[key]},
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", dtick=0.30103)
    figure.update_yaxes(type="log", dtick=1)
    return figure.update_layout(template="plotly_white")


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure as it looks in Chromium."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    figure.update_layout(width=WIDTH, height=HEIGHT, margin={"t": 60, "r": 20, "b": 50, "l": 70})
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = Path(folder, "figure.html")
        plotly.io.write_html(figure, page_file, config={"displayModeBar": False})
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=1.5
        )
        page.goto(page_file.as_uri())
        page.locator(".plotly-graph-div").screenshot(path=path)
        browser.close()


if __name__ == "__main__":
    report, bench = map(Path, sys.argv[1:])
    write_png(target_rank(report), DEMOS / "target_rank.png")
    write_png(smallest_edit(report), DEMOS / "smallest_edit.png")
    write_png(growth(bench), DEMOS / "growth.png")
