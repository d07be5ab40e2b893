"""``python -m tl_backward evaluate``."""

from __future__ import annotations

import re
import zlib
from enum import Enum
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

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
    gradient_step = "gradient-step"
    fine_tuning = "fine-tuning"
    unedited = "unedited"


class Tokens(str, Enum):
    """Which tokens of a target the shift writes."""

    first = "first"
    all = "all"


LONGEST_NAME = 200
KEY_LINES = 400
"""Lines for the whitened key: those behind the ones whose perplexity is measured."""


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
            help=f"Whiten the shift's key by {KEY_LINES} lines of this text, as --perplexity "
            "takes it.",
            metavar="TEXT",
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="Records.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(help="Records at once.", metavar="N")] = 16,
    generation: Annotated[bool, typer.Option(help="Measure n-gram entropy, too.")] = False,
    perplexity: Annotated[
        str | None,
        typer.Option(
            help="Text file, or a data set on the hub, to measure perplexity on.", metavar="TEXT"
        ),
    ] = None,
    text_every: Annotated[
        int, typer.Option(help="Measure these two for every k-th record.", metavar="K")
    ] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the results (Parquet), with one for each method; to resume from. It "
            "refuses what has other records, options, model or versions.",
            metavar="FOLDER",
        ),
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
        if method is MethodName.shift:
            name = f"shift, layer {layer}, lr {lr}, {tokens.value} tokens"
            name += "" if whiten is None else f", whitened by {whiten}"
            methods[name] = _shift(bridge, layer, lr, tokens, whiten)
        elif method is not MethodName.unedited:
            name = f"{method.value}, layer {layer}, lr {lr}"
            methods[name] = _descent(method, layer, lr)
        results = {
            name: evaluation.evaluate(
                bridge,
                records,
                made,
                batch_size=batch_size,
                generation=generation,
                perplexity_texts=texts,
                text_every=text_every,
                path=None if out is None else out / _folder(name),
            )
            for name, made in methods.items()
        }
        console.print(_shown(evaluation.table(results)))


def _shift(model: Any, layer: int | None, lr: str, tokens: Tokens, whiten: str | None) -> Any:
    from tl_backward import evaluation, key_statistics

    at = _given(layer)
    step: Any = lr if lr == "auto" else _step(lr)
    if whiten is None:
        return evaluation.shift(layer=at, lr=step, tokens=tokens.value)
    lines = evaluation.wikitext_lines(whiten, evaluation.N_LINES + KEY_LINES)[evaluation.N_LINES :]
    if not lines:
        raise ValueError(
            f"--whiten: {whiten} has no lines behind the {evaluation.N_LINES} whose perplexity is "
            "measured"
        )
    statistics = key_statistics(model, lines, at, prepend_bos=False)
    return evaluation.shift(
        layer=at, lr=step, tokens=tokens.value, key="whitened", statistics=statistics
    )


def _descent(method: MethodName, layer: int | None, lr: str) -> Any:
    from tl_backward import evaluation

    if lr == "auto":
        raise ValueError(f"--lr must be a number for {method.value}")
    if method is MethodName.fine_tuning:
        return evaluation.fine_tuning(lr=_step(lr), layers=_given(layer))
    return evaluation.gradient(lr=_step(lr), layers=_given(layer))


def _given(layer: int | None) -> int:
    if layer is None:
        raise ValueError("--layer is missing: which W_out to edit")
    return layer


def _step(lr: str) -> float:
    try:
        return float(lr)
    except ValueError:
        raise ValueError(f"--lr takes a number, or 'auto' for the shift, got {lr!r}") from None


def _folder(name: str) -> str:
    """A folder for each method, with the signs and paths that tell it from others."""
    quoted = quote(re.sub("[, ]+", "-", name), safe="", errors="surrogateescape")
    if len(quoted) <= LONGEST_NAME:
        return quoted
    return f"{quoted[:LONGEST_NAME]}-{zlib.crc32(quoted.encode()):08x}"


def _shown(table: Any) -> Table:
    """Methods side by side, one row for each metric: mean and standard deviation in percent."""
    shown = Table("metric", *map(str, table.index), header_style="bold")
    for family, metric in table.columns:
        shown.add_row(f"{metric} ({family})", *table[family, metric])
    return shown
