"""What the commands show of an edit that was read from a fine-tune."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tl_backward.editing import WeightEdit

SITES_SHOWN, TOKENS_SHOWN, MOST = 20, 3, 12

DirectionsOption = Annotated[
    int, typer.Option("--directions", help="Directions of each weight to read.", metavar="K", min=1)
]
HtmlOption = Annotated[
    Path | None,
    typer.Option(help="Write a page with every weight.", metavar="FILE", show_default=False),
]
SaveOption = Annotated[
    Path | None,
    typer.Option(help="Write the edit (safetensors).", metavar="FILE", show_default=False),
]


def show(
    console: Console, edit: WeightEdit, directions: int, html: Path | None, save: Path | None
) -> None:
    """Where the edit writes, which tokens come up most, and the files that were asked for."""
    from tl_backward.lens import BackwardLogitLens

    if not edit.factors:
        console.print("the weights do not differ")
        return
    sites, tokens = edit.summary(directions)
    table = Table("weight", header_style="bold", title="Where the norm sits")
    for name in ("norm", "of the energy", "effective rank"):
        table.add_column(name, justify="right")
    for sign in "+-":
        table.add_column(f"tokens of direction 0, end {sign}")
    for row in sites.head(SITES_SHOWN).itertuples():
        table.add_row(
            row.site,
            f"{row.norm:.3g}",
            f"{row.energy_share:.1%}",
            f"{row.effective_rank:.1f}",
            _tokens(row.top[:TOKENS_SHOWN]),
            _tokens(row.bottom[:TOKENS_SHOWN]),
        )
    console.print(table)
    if len(sites) > SITES_SHOWN:
        console.print(f"and {len(sites) - SITES_SHOWN} weights more")
    for side, text in (("writes", "write to the residual stream"), ("reads", "read it")):
        most = tokens[tokens.side == side].head(MOST)
        if len(most):
            console.print(f"most often at an end, of weights that {text}: {_tokens(most.token)}")
    console.print(
        "the ends of a direction go with opposite inputs; the page names the neuron or head"
    )
    if save:
        console.print(f"the edit: {edit.save(save).resolve()}")
    if html:
        assert edit.model is not None
        page = BackwardLogitLens(edit.model).edit(edit, k=directions).to_html(html).resolve()
        console.print(f"all weights as a page, open it in a browser: {page.as_uri()}")


def _tokens(tokens: Iterable[str]) -> str:
    from tl_backward.plotting import visible

    return "  ".join(map(visible, tokens))
