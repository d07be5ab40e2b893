"""``python -m tl_backward diff``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_backward.commands.checks import (
    integers,
    parts,
    require_model_folder,
    require_replaceable,
    require_writable,
)
from tl_backward.commands.shared import (
    console_for_output,
    exit_code_2_on_bad_input,
    load,
    progress,
)
from tl_backward.commands.written import DirectionsOption, HtmlOption, SaveOption, show


def diff(
    base: Annotated[
        str, typer.Argument(help="Model before: hub name or local folder.", show_default=False)
    ],
    tuned: Annotated[
        str, typer.Argument(help="Model after: hub name or local folder.", show_default=False)
    ],
    weights: Annotated[
        str | None, typer.Option(help="Weight matrices.", metavar="LIST", show_default="all")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers, such as 0,5,-1 (-1 is the last).", metavar="LIST", show_default="all"
        ),
    ] = None,
    rank: Annotated[
        str, typer.Option(help="Directions of each weight to keep, or a share of its energy.")
    ] = "8",
    directions: DirectionsOption = 3,
    html: HtmlOption = None,
    save: SaveOption = None,
) -> None:
    """Show what a fine-tune wrote: the difference of two models in the vocabulary.

    The leading singular directions of every weight's difference; `--save` keeps them as an edit.
    """
    console = console_for_output()
    with exit_code_2_on_bad_input():
        require_writable(html=html, save=save)
        require_replaceable(save=save)
        kinds = None if weights is None else parts(weights, "--weights")
        indices = None if layers is None else integers(layers, "--layers")
        kept = _rank(rank)
        for name, model in (("BASE", base), ("TUNED", tuned)):
            _require_no_adapter(name, model)
            require_model_folder(model, name)
        with progress(console, "loading the libraries") as go_on_with:
            from tl_backward.editing import WeightEdit

            go_on_with(f"loading {base}")
            before = load(base, "BASE")
            go_on_with(f"loading {tuned}")
            after = load(tuned, "TUNED")
            go_on_with("comparing the weights")
            edit = WeightEdit.from_difference(before, after, kinds, indices, kept)
        show(console, edit, directions, html, save)
        left_out = max((one.left_out for one in edit.report.sites), default=0.0)
        console.print(f"rank {rank} leaves out {left_out:.1%} of the energy of a weight at most")


def _rank(text: str) -> int | float:
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise ValueError(f"--rank takes a number such as 8 or 0.9, got {text!r}") from None


def _require_no_adapter(name: str, model: str) -> None:
    if (Path(model) / "adapter_config.json").is_file():
        raise ValueError(
            f"{name}: {model!r} is an adapter; use python -m tl_backward adapter {model} "
            "--model BASE"
        )
