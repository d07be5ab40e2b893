"""``python -m tl_backward evaluate``."""

from __future__ import annotations

import re
import zlib
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from tl_backward.commands.checks import number_or_auto, require_data, require_model_folder
from tl_backward.commands.shared import (
    DEFAULT_MODEL,
    BosOption,
    ModelOption,
    console_for_output,
    exit_code_2_on_bad_input,
    load,
    progress,
    with_or_without_bos,
)

if TYPE_CHECKING:
    import pandas as pd


class MethodName(str, Enum):
    """The methods of the command."""

    shift = "shift"
    gradient_step = "gradient-step"
    fine_tuning = "fine-tuning"
    unedited = "unedited"


class Tokens(str, Enum):
    """Tokens of a target that the shift writes."""

    first = "first"
    all = "all"


LONGEST_NAME = 200
KEY_LINES = 400
"""Number of lines for the whitened key, taken after those for perplexity."""


def evaluate(
    data: Annotated[
        str, typer.Option(help="CounterFact records: a JSON file, or a data set on the hub.")
    ],
    method: Annotated[MethodName, typer.Option(help="How to edit.")] = MethodName.shift,
    layer: Annotated[int | None, typer.Option(help="Layer of W_out.", show_default=False)] = None,
    lr: Annotated[str, typer.Option(help="Step, or for the shift 'auto'.")] = "auto",
    tokens: Annotated[
        Tokens, typer.Option(help="Tokens of the target that the shift writes.")
    ] = Tokens.first,
    whiten: Annotated[
        str | None,
        typer.Option(
            help=f"Whiten the shift's key with {KEY_LINES} lines of this text file or data set.",
            metavar="TEXT",
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="Records.", show_default="all", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Records at once.", metavar="N", min=1)] = 16,
    generation: Annotated[bool, typer.Option(help="Also measure n-gram entropy.")] = False,
    perplexity: Annotated[
        str | None,
        typer.Option(
            help="Text file, or a data set on the hub, to measure perplexity on.", metavar="TEXT"
        ),
    ] = None,
    text_every: Annotated[
        int,
        typer.Option(
            help="Measure entropy and perplexity for every k-th record only.", metavar="K", min=1
        ),
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results (Parquet), with a subfolder per method, to resume from. "
            "Results of other records, options, models or versions are refused.",
            metavar="FOLDER",
        ),
    ] = None,
    model: ModelOption = None,
    bos: BosOption = None,
) -> None:
    """Edit a model for each CounterFact record, and print a table of the edits' effects."""
    console = console_for_output()
    with exit_code_2_on_bad_input():
        step = number_or_auto(lr, "--lr", float)
        edits = method is not MethodName.unedited
        if edits and layer is None:
            raise ValueError("--layer is missing; pass the layer of W_out to edit")
        if edits and step == "auto" and method is not MethodName.shift:
            raise ValueError(f"--lr must be a number for {method.value}")
        require_data(data=data, perplexity=perplexity, whiten=whiten)
        require_model_folder(model)
        with progress(console, "reading the data") as go_on_with:
            from tl_backward import evaluation, weight_sites
            from tl_backward.capture.bos import prepends_bos

            records = evaluation.load_records(data, n)
            texts = None if perplexity is None else evaluation.wikitext_lines(perplexity)
            key_lines = None if whiten is None else _key_lines(whiten)
            go_on_with(f"loading {model or DEFAULT_MODEL}")
            bridge = load(model)
            prepend_bos = prepends_bos(bridge, bos)
        if layer is not None:
            try:
                weight_sites(bridge, "W_out", layers=layer)
            except (NotImplementedError, ValueError) as error:
                raise type(error)(f"--layer {layer}: {error}") from error
        methods: dict[str, evaluation.Method] = {"unedited": evaluation.unedited}
        if method is MethodName.shift:
            name = f"shift, layer {layer}, lr {lr}, {tokens.value} tokens"
            name += "" if whiten is None else f", whitened by {whiten}"
            methods[name] = _shift(bridge, layer, step, tokens, key_lines, prepend_bos)
        elif edits:
            name = f"{method.value}, layer {layer}, lr {lr}"
            descent = (
                evaluation.gradient
                if method is MethodName.gradient_step
                else evaluation.fine_tuning
            )
            methods[name] = descent(lr=step, layers=layer)
        results = {
            name: evaluation.evaluate(
                bridge,
                records,
                made,
                batch_size=batch_size,
                generation=generation,
                perplexity_texts=texts,
                text_every=text_every,
                prepend_bos=prepend_bos,
                path=None if out is None else out / _folder(name),
            )
            for name, made in methods.items()
        }
        console.print(_shown(evaluation.table(results), with_or_without_bos(prepend_bos)))
        _require_measured(results)


def _key_lines(source: str) -> list[str]:
    """The lines after those for perplexity."""
    from tl_backward.evaluation import N_LINES, wikitext_lines

    lines = wikitext_lines(source, N_LINES + KEY_LINES)[N_LINES:]
    if not lines:
        raise ValueError(
            f"--whiten: {source} has no lines after the first {N_LINES}, which measure perplexity"
        )
    return lines


def _shift(
    model: Any,
    layer: Any,
    lr: Any,
    tokens: Tokens,
    key_lines: list[str] | None,
    prepend_bos: bool,
) -> Any:
    from tl_backward import evaluation, key_statistics

    if key_lines is None:
        return evaluation.shift(layer=layer, lr=lr, tokens=tokens.value)
    statistics = key_statistics(model, key_lines, layer, prepend_bos=prepend_bos)
    return evaluation.shift(
        layer=layer, lr=lr, tokens=tokens.value, key="whitened", statistics=statistics
    )


def _require_measured(results: dict[str, pd.DataFrame]) -> None:
    """Raise if a method has no measurements."""
    for name, frame in results.items():
        if "efficacy_success" not in frame or frame["efficacy_success"].isna().all():
            raise ValueError(f"{name}: all records failed; {frame['error'].iloc[0]}")


def _folder(name: str) -> str:
    """A unique folder name for each method."""
    quoted = quote(re.sub("[, ]+", "-", name), safe="", errors="surrogateescape")
    if len(quoted) <= LONGEST_NAME:
        return quoted
    return f"{quoted[:LONGEST_NAME]}-{zlib.crc32(quoted.encode()):08x}"


def _shown(table: Any, caption: str) -> Table:
    """Methods side by side, one row per metric: mean and standard deviation in per cent."""
    shown = Table("metric", *map(str, table.index), header_style="bold", caption=caption)
    for family, metric in table.columns:
        shown.add_row(f"{metric} ({family})", *table[family, metric])
    return shown
