"""``python -m tl_backward evaluate``."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import typer
from rich.table import Table

from tl_backward.commands.checks import require_data, require_model_folder
from tl_backward.commands.methods import (
    MethodName,
    Needs,
    checked_layers,
    combinations,
    maker,
    mend_editor,
    named,
    parsed_grid,
    require_consistent,
    statistics_of,
)
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
    layer: Annotated[
        str | None,
        typer.Option(
            help="Layer of W_out; for memit and alpha-edit the last of five; for mend all that it "
            "edits, by default the last three. Several, with commas, are chosen from (see --tune).",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[
        str,
        typer.Option(
            help="Step, or several to choose from. 'auto': for the shift the smallest that "
            "succeeds, else that of the published code."
        ),
    ] = "auto",
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Another argument of the editor, such as value=centred, bound=0.0005 or "
            "weight=1000,20000 (several to choose from). May be repeated.",
            metavar="NAME=VALUE",
        ),
    ] = None,
    n_tune: Annotated[
        int,
        typer.Option(
            "--tune",
            help="Records to choose settings on, by their score: those behind the ones that are "
            "measured.",
            metavar="N",
            min=1,
        ),
    ] = 50,
    tokens: Annotated[
        Tokens, typer.Option(help="Tokens of the target that the shift writes.")
    ] = Tokens.first,
    whiten: Annotated[
        str | None,
        typer.Option(
            help=f"Whiten keys by {KEY_LINES} lines of this text, as --perplexity takes it: for "
            "the shift and rome if given; memit and alpha-edit need it.",
            metavar="TEXT",
        ),
    ] = None,
    contexts: Annotated[
        int | None,
        typer.Option(
            help="Contexts in which rome, memit and alpha-edit search a value, the plain prompt "
            "and texts before it that the model writes; fewer are faster.",
            show_default="as published: 21, and 6",
            metavar="N",
            min=1,
        ),
    ] = None,
    editor: Annotated[
        Path | None,
        typer.Option(
            help="File of a MEND editor: read if it is there, else written after its training on "
            "the records behind those that are measured and tuned on.",
            metavar="FILE",
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("-n", help="Records.", show_default="all", min=1)] = None,
    size: Annotated[
        int, typer.Option(help="Facts that are edited before they are measured.", min=1)
    ] = 1,
    in_turn: Annotated[
        bool, typer.Option("--in-turn", help="Edit them one after another, not at once.")
    ] = False,
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
        grid = parsed_grid(method, layer, lr, set_ or [])
        require_consistent(method, whiten, contexts, editor)
        require_data(data=data, perplexity=perplexity, whiten=whiten)
        require_model_folder(model)
        is_tuned = len(combinations(grid)) > 1
        with progress(console, "reading the data") as go_on_with:
            from tl_backward import evaluation
            from tl_backward.capture.bos import prepends_bos

            records = evaluation.load_records(data, n)
            needs_others = is_tuned or method is MethodName.mend
            others = evaluation.load_records(data)[len(records) :] if needs_others else []
            if is_tuned and len(others) < n_tune:
                raise ValueError(
                    f"--tune: of the records behind those that are measured there are "
                    f"{len(others)}, fewer than {n_tune}; pass a smaller -n or --tune"
                )
            texts = None if perplexity is None else evaluation.wikitext_lines(perplexity)
            key_lines = None if whiten is None else _key_lines(whiten)
            go_on_with(f"loading {model or DEFAULT_MODEL}")
            bridge = load(model)
            prepend_bos = prepends_bos(bridge, bos)
        shared: dict[str, Any] = {"batch_size": batch_size, "prepend_bos": prepend_bos}
        groups = {"size": size, "schedule": "in turn" if in_turn else "together"}
        about: dict[str, Any] = {"method": method.value, "whiten": whiten, "contexts": contexts}
        about |= groups
        runs: dict[str, tuple[evaluation.Method, dict[str, Any]]] = {
            "unedited": (evaluation.unedited, {})
        }
        if method is not MethodName.unedited:
            labels = [
                f"{tokens.value} tokens" if method is MethodName.shift else "",
                f"whitened by {whiten}" if whiten is not None else "",
                f"{contexts} contexts" if contexts is not None else "",
                f"{size} facts {groups['schedule']}" if size > 1 else "",
            ]
            layers = checked_layers(bridge, method, grid)
            statistics = None
            if key_lines is not None:
                statistics = statistics_of(method, bridge, key_lines, layers, prepend_bos)
                about["statistics_tokens"] = statistics.n_tokens
            settings = combinations(grid)[0]
            if method is MethodName.mend:
                trained = mend_editor(bridge, others[n_tune:], editor, prepend_bos, settings)
                about["training"] = asdict(trained.report)
                made = evaluation.mend(trained)
            else:
                make = maker(method, Needs(bridge, prepend_bos, statistics, contexts), tokens.value)
                made = make(**settings)
            if is_tuned:
                tuning = named(method, grid, *labels, f"chosen on {n_tune}")
                path = None if out is None else out / "tuning" / _folder(tuning)
                records_to_tune = others[:n_tune]
                settings, made, table = evaluation.tune(
                    bridge, records_to_tune, make, grid, path=path, **shared, **groups
                )
                console.print(_chosen(table, settings, n_tune))
                about |= {"tuned_on": n_tune, "tuning": table.to_dict("records")}
            name = named(method, settings, *labels)
            about |= {"name": name, "settings": settings}
            runs[name] = made, groups
        results = {
            name: evaluation.evaluate(
                bridge,
                records,
                made,
                generation=generation,
                perplexity_texts=texts,
                text_every=text_every,
                path=None if out is None else out / _folder(name),
                **shared,
                **of_run,
            )
            for name, (made, of_run) in runs.items()
        }
        if out is not None and "name" in about:
            file = out / f"{_folder(about['name'])}.json"
            file.write_text(json.dumps(about, indent=1))
        console.print(_shown(evaluation.table(results), with_or_without_bos(prepend_bos)))
        _require_measured(results)


def _chosen(tried: pd.DataFrame, settings: Mapping[str, Any], n_tune: int) -> Table:
    """The settings that were tried, and the ones that were chosen."""
    chosen = ", ".join(f"{key} {value}" for key, value in settings.items())
    caption = f"chosen by their score on {n_tune} other records: {chosen}"
    shown = Table(*map(str, tried.columns), header_style="bold", caption=caption)
    for row in tried.to_dict("records"):
        shown.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    return shown


def _key_lines(source: str) -> list[str]:
    """The lines after those for perplexity."""
    from tl_backward.evaluation import N_LINES, wikitext_lines

    lines = wikitext_lines(source, N_LINES + KEY_LINES)[N_LINES:]
    if not lines:
        raise ValueError(
            f"--whiten: {source} has no lines after the first {N_LINES}, which measure perplexity"
        )
    return lines


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
