"""``python -m tl_backward reproduce``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tl_backward.commands.checks import require_data, require_model_folder
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

    from tl_backward.plotting import Chapter
    from tl_backward.provenance import Provenance

N_LINES, N_WORDS = 5, 25


def reproduce(
    data: Annotated[
        str, typer.Option(help="CounterFact records: a JSON file, or a data set on the hub.")
    ],
    experiments: Annotated[
        list[str] | None, typer.Argument(help="Names of experiments.", show_default="all")
    ] = None,
    model: ModelOption = None,
    n: Annotated[int, typer.Option("-n", help="Records.", min=1)] = 100,
    out: Annotated[Path, typer.Option(help="Folder for tables, figures and the report.")] = Path(
        "backward_lens"
    ),
    perplexity: Annotated[
        str | None,
        typer.Option(
            help=f"Text file, or a data set on the hub: smallest_edit and many_edits measure the "
            f"perplexity of {N_WORDS} words of {N_LINES} lines.",
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
    bos: BosOption = None,
) -> None:
    """Run the paper's experiments and its open questions on a model, and write one report.

    Each experiment writes a table (Parquet), a figure (plotly JSON) and a chapter of `report.html`.
    The report is updated after every experiment and keeps the chapters of earlier runs. `rows`
    holds the results of an interrupted run, to resume from. A folder is for one model, set of
    records, set of versions and choice of BOS; others are refused.
    """
    console = console_for_output()
    with exit_code_2_on_bad_input():
        require_data(data=data, perplexity=perplexity)
        if jacobian_lens is not None and not jacobian_lens.is_file():
            raise FileNotFoundError(f"--jacobian-lens: there is no file {str(jacobian_lens)!r}")
        require_model_folder(model)
        with progress(console, "reading the data") as go_on_with:
            import pyarrow as pa

            from tl_backward import table_files
            from tl_backward.analysis import EXPERIMENTS
            from tl_backward.capture.bos import prepends_bos
            from tl_backward.evaluation import load_records, wikitext_lines
            from tl_backward.plotting import report_page
            from tl_backward.provenance import hash_of, only_writer, provenance

            names = list(dict.fromkeys(experiments or EXPERIMENTS))
            unknown = [name for name in names if name not in EXPERIMENTS]
            if unknown:
                raise ValueError(
                    f"no experiment {unknown[0]!r}; available: {', '.join(EXPERIMENTS)}"
                )
            records = load_records(data, n)
            options: dict[str, Any] = {}
            if perplexity is not None:
                lines = wikitext_lines(perplexity, N_LINES)
                options["texts"] = [" ".join(line.split()[:N_WORDS]) for line in lines]
            if jacobian_lens is not None:
                options["jacobian_lens"] = _jacobian_lens(jacobian_lens)
            go_on_with(f"loading {model or DEFAULT_MODEL}")
            bridge = load(model)
            prepend_bos = prepends_bos(bridge, bos)
        if jacobian_lens is not None:
            _require_fitted_on(options["jacobian_lens"], bridge, jacobian_lens)
        texts = with_or_without_bos(prepend_bos)
        title = f"{model or DEFAULT_MODEL}, {len(records)} records, {texts}"
        with only_writer(out):
            made_by = provenance(records, model=bridge, options={"prepend_bos": prepend_bos})
            chapters = _finished_chapters(out, made_by)
            for name in names:
                experiment = EXPERIMENTS[name]
                start = time.monotonic()
                own = {key: options[key] for key in experiment.options if key in options}
                if experiment.resumes:
                    own["path"] = out / "rows" / name
                table = experiment.run(bridge, records, prepend_bos=prepend_bos, **own)
                seconds = time.monotonic() - start
                contents = {"made_by": hash_of(made_by), "seconds": seconds}
                table_files.write(out / f"{name}.parquet", pa.Table.from_pandas(table), contents)
                chapters[name] = _chapter(name, table, seconds)
                chapters[name].figure.write_json(out / f"{name}.json")
                console.print(f"{name}: {len(table)} rows, {seconds:.0f} s")
                in_order = [chapters[each] for each in EXPERIMENTS if each in chapters]
                (out / "report.html").write_text(report_page(title, in_order), encoding="utf-8")
        console.print(f"report: {(out / 'report.html').resolve().as_uri()}")


def _finished_chapters(out: Path, made_by: Provenance) -> dict[str, Chapter]:
    """The chapters of earlier runs, after checking that they have the same provenance."""
    from tl_backward import table_files
    from tl_backward.analysis import EXPERIMENTS
    from tl_backward.provenance import require_same

    files = {name: out / f"{name}.parquet" for name in EXPERIMENTS}
    found = {name: table_files.read(file) for name, file in files.items() if file.exists()}
    require_same(out, made_by, {name: head.get("made_by") for name, (_, head) in found.items()})
    return {
        name: _chapter(name, table.to_pandas(), contents["seconds"])
        for name, (table, contents) in found.items()
    }


def _chapter(name: str, table: pd.DataFrame, seconds: float) -> Chapter:
    from tl_backward.analysis import EXPERIMENTS
    from tl_backward.plotting import Chapter

    experiment = EXPERIMENTS[name]
    return Chapter(name, experiment.about, experiment.plot(table), seconds, len(table))


def _jacobian_lens(file: Path) -> Any:
    try:
        from transformer_lens.tools.analysis import JacobianLens
    except ImportError as error:
        raise ImportError(
            "--jacobian-lens needs TransformerLens 4: pip install 'transformer-lens>=4'"
        ) from error
    try:
        return JacobianLens.load(str(file))
    except Exception as error:  # reading a foreign file can raise anything
        raise ValueError(
            f"--jacobian-lens: {str(file)!r} is not an artifact of TransformerLens's JacobianLens "
            f"({type(error).__name__})"
        ) from error


def _require_fitted_on(lens: Any, model: Any, file: Path) -> None:
    try:
        lens.validate_model(model)
    except (TypeError, ValueError) as error:
        raise ValueError(f"--jacobian-lens: {str(file)!r}: {error}") from error
