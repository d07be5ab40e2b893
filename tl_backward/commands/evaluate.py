"""``python -m tl_backward evaluate``."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tl_backward.commands.shared import (
    DEFAULT_MODEL,
    ModelOption,
    console_for_output,
    exit_code_2_on_bad_input,
    load,
)


class MethodName(str, Enum):
    """The methods that the command knows."""

    shift = "shift"
    fine_tuning = "fine-tuning"
    unedited = "unedited"


def evaluate(
    data: Annotated[
        str, typer.Option(help="CounterFact records: a JSON file, or a data set on the hub.")
    ],
    method: Annotated[MethodName, typer.Option(help="How to edit.")] = MethodName.shift,
    layer: Annotated[int | None, typer.Option(help="Layer of W_out.", show_default=False)] = None,
    lr: Annotated[str, typer.Option(help="Step, or for the shift 'auto'.")] = "auto",
    n: Annotated[int | None, typer.Option("-n", help="Records.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(help="Records at once.", metavar="N")] = 16,
    generation: Annotated[bool, typer.Option(help="Measure n-gram entropy, too.")] = False,
    perplexity: Annotated[
        str | None,
        typer.Option(help="Text file, or a data set on the hub, to measure perplexity on."),
    ] = None,
    perplexity_every: Annotated[
        int, typer.Option(help="Measure it for every k-th record.", metavar="K")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results (Parquet), to resume from.", metavar="FOLDER"),
    ] = None,
    model: ModelOption = None,
) -> None:
    """Edit a model for each CounterFact record, and print what the edits did, as a table."""
    console = console_for_output()
    with exit_code_2_on_bad_input():
        with console.status(f"loading {model or DEFAULT_MODEL}"):
            from tl_backward import evaluation

            bridge = load(model)
            records = evaluation.load_records(data, n)
            texts = None if perplexity is None else evaluation.wikitext_lines(perplexity)
        methods = {"unedited": evaluation.unedited}
        if method is not MethodName.unedited:
            methods[method.value] = _method(method, layer, lr)
        results = {
            name: evaluation.evaluate(
                bridge,
                records,
                made,
                batch_size=batch_size,
                generation=generation,
                perplexity_texts=texts,
                perplexity_every=perplexity_every,
                path=None if out is None else out / name,
            )
            for name, made in methods.items()
        }
        console.print(_shown(evaluation.table(results)))


def _method(method: MethodName, layer: int | None, lr: str) -> Any:
    from tl_backward import evaluation

    if layer is None:
        raise ValueError("--layer is missing: which W_out to edit")
    if method is MethodName.shift:
        return evaluation.shift(layer=layer, lr="auto" if lr == "auto" else _step(lr))
    if lr == "auto":
        raise ValueError("--lr must be a number for fine-tuning")
    return evaluation.fine_tuning(lr=_step(lr), layers=layer)


def _step(lr: str) -> float:
    try:
        return float(lr)
    except ValueError:
        raise ValueError(f"--lr takes a number, or 'auto' for the shift, got {lr!r}") from None


def _shown(table: Any) -> Table:
    """Methods side by side, one row for each metric: mean and standard deviation in percent."""
    shown = Table("metric", *map(str, table.index), header_style="bold")
    for family, metric in table.columns:
        shown.add_row(f"{metric} ({family})", *table[family, metric])
    return shown
