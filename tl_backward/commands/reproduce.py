"""``python -m tl_backward reproduce``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from tl_backward.commands.shared import (
    DEFAULT_MODEL,
    ModelOption,
    console_for_output,
    exit_code_2_on_bad_input,
    load,
    require_same_options,
)

N_LINES, N_WORDS = 5, 25


def reproduce(
    data: Annotated[
        str, typer.Option(help="CounterFact records: a JSON file, or a data set on the hub.")
    ],
    experiments: Annotated[
        list[str] | None, typer.Argument(help="Names of experiments.", show_default="all")
    ] = None,
    model: ModelOption = None,
    n: Annotated[int, typer.Option("-n", help="Records.")] = 100,
    out: Annotated[Path, typer.Option(help="Folder for tables, figures and the report.")] = Path(
        "backward_lens"
    ),
    perplexity: Annotated[
        str | None,
        typer.Option(
            help=f"Text file, or a data set on the hub: the perplexity of {N_WORDS} words of "
            f"{N_LINES} lines tells what smallest_edit and many_edits do elsewhere.",
            metavar="TEXT",
        ),
    ] = None,
    jacobian_lens: Annotated[
        Path | None,
        typer.Option(
            help="Artifact of TransformerLens's JacobianLens, for translator_ranks.",
            metavar="FILE",
        ),
    ] = None,
    prepend_bos: Annotated[
        bool, typer.Option(help="Put a BOS token before the prompts; the paper has none.")
    ] = False,
) -> None:
    """Run the paper's experiments and its open questions on a model, and write one report.

    Each gives a table (Parquet) and a figure (plotly's JSON) in the folder, and a chapter of
    `report.html`, which is written anew after every experiment. What an interrupted run has done
    is kept in `rows`, and not done again.
    """
    console = console_for_output()
    with exit_code_2_on_bad_input():
        with console.status(f"loading {model or DEFAULT_MODEL}"):
            from tl_backward.analysis import EXPERIMENTS
            from tl_backward.evaluation import load_records, wikitext_lines
            from tl_backward.plotting import Chapter, report_page

            names = experiments or list(EXPERIMENTS)
            unknown = [name for name in names if name not in EXPERIMENTS]
            if unknown:
                raise ValueError(f"no experiment {unknown[0]!r}; there is {', '.join(EXPERIMENTS)}")
            records = load_records(data, n)
            bridge = load(model)
            options: dict[str, Any] = {}
            if perplexity is not None:
                lines = wikitext_lines(perplexity, N_LINES)
                options["texts"] = [" ".join(line.split()[:N_WORDS]) for line in lines]
            if jacobian_lens is not None:
                options["jacobian_lens"] = _jacobian_lens(jacobian_lens)
        given = {"model": model, "perplexity": perplexity, "jacobian-lens": jacobian_lens}
        given = {name: value and str(value) for name, value in given.items()}
        require_same_options(out, given | {"prepend-bos": prepend_bos})
        chapters = []
        for name in names:
            experiment = EXPERIMENTS[name]
            start = time.monotonic()
            own = {key: options[key] for key in experiment.options if key in options}
            if experiment.resumes:
                own["path"] = out / "rows" / name
            table = experiment.run(bridge, records, prepend_bos=prepend_bos, **own)
            seconds = time.monotonic() - start
            table.to_parquet(out / f"{name}.parquet")
            figure = experiment.plot(table)
            figure.write_json(out / f"{name}.json")
            chapters.append(Chapter(name, experiment.about, figure, seconds, len(table)))
            console.print(f"{name}: {len(table)} rows, {seconds:.0f} s")
            title = f"{model or DEFAULT_MODEL}, {len(records)} records"
            (out / "report.html").write_text(report_page(title, chapters), encoding="utf-8")
        console.print(f"report: {escape((out / 'report.html').resolve().as_uri())}")


def _jacobian_lens(file: Path) -> Any:
    try:
        from transformer_lens.tools.analysis import JacobianLens
    except ImportError as error:
        raise ImportError(
            "--jacobian-lens needs TransformerLens 4: pip install 'transformer-lens>=4'"
        ) from error
    return JacobianLens.load(str(file))
