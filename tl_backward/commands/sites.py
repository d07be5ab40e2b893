"""``python -m tl_backward sites``."""

from __future__ import annotations

from rich.table import Table

from tl_backward.commands.checks import require_model_folder
from tl_backward.commands.shared import (
    DEFAULT_MODEL,
    ModelOption,
    console_for_output,
    exit_code_2_on_bad_input,
    load,
    progress,
)


def sites(model: ModelOption = None) -> None:
    """List every parameter of a model with its site, or the reason why it has none."""
    console = console_for_output()
    with exit_code_2_on_bad_input():
        require_model_folder(model)
        with progress(console, f"loading {model or DEFAULT_MODEL}"):
            from tl_backward import coverage

            covered = coverage(load(model))
        table = Table("parameter", "shape", "site, or why it has none", header_style="bold")
        for row in covered.assign(site=covered.site.fillna(covered.reason)).to_dict("records"):
            shape = " x ".join(map(str, row["shape"]))
            table.add_row(row["parameter"], shape, row["site"])
        console.print(table)
        console.print(f"{covered.site.notna().sum()} of {len(covered)} parameters have a site")
