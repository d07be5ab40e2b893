"""``python -m tl_backward adapter``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tl_backward.commands.checks import (
    require_model_folder,
    require_replaceable,
    require_writable,
)
from tl_backward.commands.shared import (
    DEFAULT_MODEL,
    ModelOption,
    console_for_output,
    exit_code_2_on_bad_input,
    load,
    progress,
)
from tl_backward.commands.written import DirectionsOption, HtmlOption, SaveOption, show


def adapter(
    adapter: Annotated[
        Path,
        typer.Argument(help="Folder or safetensors file of a LoRA adapter.", show_default=False),
    ],
    model: ModelOption = None,
    directions: DirectionsOption = 3,
    html: HtmlOption = None,
    save: SaveOption = None,
) -> None:
    """Show what a LoRA adapter adds to its base model, in the vocabulary.

    It is read as it is, without merging it; `--save` keeps it as an edit.
    """
    console = console_for_output()
    with exit_code_2_on_bad_input():
        require_writable(html=html, save=save)
        require_replaceable(save=save)
        if not adapter.exists():
            raise FileNotFoundError(f"ADAPTER: there is no {str(adapter)!r}")
        require_model_folder(model)
        with progress(console, "loading the libraries") as go_on_with:
            from tl_backward.editing import WeightEdit

            go_on_with(f"loading {model or DEFAULT_MODEL}")
            base = load(model)
            go_on_with("reading the adapter")
            edit = WeightEdit.from_peft(base, adapter)
        show(console, edit, directions, html, save)
        trained_on = edit.report.base or "a base that it does not name"
        console.print(
            f"{len(edit.report.modules)} modules; trained on {trained_on}, read on "
            f"{model or DEFAULT_MODEL}"
        )
