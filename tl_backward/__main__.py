"""The command line: ``python -m tl_backward``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from tl_backward.lens_result import BackwardLensResult

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Hub name or local folder, as TransformerBridge.boot_transformers takes it.",
        show_default=DEFAULT_MODEL,
    ),
]
TOKENS_SHOWN = 3
WIDTH_IN_A_PIPE = 120
BY_INPUT = "read by its inputs: the most probable tokens are imprinted"
BY_VJP = "read by its VJPs: a step moves towards the least probable tokens"


@app.callback()
def main() -> None:
    """Read a language model's backward pass in its own vocabulary."""


@app.command(
    epilog='Example: python -m tl_backward lens "Lionel Messi plays for" --target " Paris" '
    "--layers 20,-1 --html paris.html"
)
def lens(
    prompt: Annotated[str, typer.Argument(help="Text that the model reads.", show_default=False)],
    target: Annotated[
        str,
        typer.Option(
            help="Text to differentiate towards: mind the leading space.",
            show_default=False,
        ),
    ],
    model: ModelOption = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers, such as 0,5,-1 (-1 is the last).", metavar="LIST", show_default="all"
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="Weight matrices.", metavar="LIST")] = "W_in,W_out",
    top_k: Annotated[
        int, typer.Option(help="Tokens kept at each end of the vocabulary.", metavar="K")
    ] = 10,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page with every position.", metavar="FILE", show_default=False),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json", help="Write everything as JSON.", metavar="FILE", show_default=False
        ),
    ] = None,
) -> None:
    """Show what the gradient of -log p(target | prompt) would write into each layer.

    Prints a table for the last token; `--html` and `--json` keep all positions. Of a target of
    several tokens all but the last are appended to the prompt, and ranks are those of the first.
    """
    console = Console(width=None if sys.stdout.isatty() else WIDTH_IN_A_PIPE)
    with _exit_code_2_on_bad_input():
        with console.status("loading the libraries") as status:
            from tl_backward import BackwardLogitLens

            status.update(f"loading {model or DEFAULT_MODEL}")
            read = BackwardLogitLens(_load(model))
        with warnings.catch_warnings(record=True) as caught:
            result = read(
                prompt,
                target,
                weights=_split(weights),
                layers=None if layers is None else _integers(layers),
                top_k=top_k,
            )
        for warning in caught:
            Console(stderr=True).print(f"[bold yellow]warning:[/] {escape(str(warning.message))}")
        for kind in result:
            console.print(_last_token_table(result, kind))
        console.print(
            f"{escape(repr(prompt))} -> {escape(repr(target))}: "
            f"loss {result.loss:.4f} nats per token, exp(-loss) = {result.loss.neg().exp():.2g}"
        )
        if json_path:
            written = json.dumps(_as_json(result, prompt, target, model))
            json_path.write_text(written, encoding="utf-8")
            console.print(f"all positions as JSON: {escape(str(json_path.resolve()))}")
        if html:
            page = result.to_html(html).resolve()
            console.print(f"all positions as a page, open it in a browser: {page.as_uri()}")


@app.command(epilog="Example: python -m tl_backward sites --model gpt2")
def sites(model: ModelOption = None) -> None:
    """List every parameter of a model: its site, or why there is none."""
    console = Console(width=None if sys.stdout.isatty() else WIDTH_IN_A_PIPE)
    with _exit_code_2_on_bad_input():
        with console.status(f"loading {model or DEFAULT_MODEL}"):
            from tl_backward import coverage

            covered = coverage(_load(model))
        table = Table("parameter", "shape", "site, or why there is none", header_style="bold")
        for row in covered.assign(site=covered.site.fillna(covered.reason)).to_dict("records"):
            shape = " x ".join(map(str, row["shape"]))
            table.add_row(escape(row["parameter"]), shape, escape(row["site"]))
        console.print(table)
        console.print(f"{covered.site.notna().sum()} of {len(covered)} parameters have a site")


def _load(model: str | None) -> Any:
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ImportError(
            "the command line loads models as TransformerBridge, which this TransformerLens does "
            "not have: pip install 'transformer-lens>=3.9'"
        ) from error
    if model is None:
        from tl_backward.demo_model import load_demo_model

        return load_demo_model()
    try:
        return TransformerBridge.boot_transformers(model).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load --model {model}: {error}") from error


@contextmanager
def _exit_code_2_on_bad_input() -> Iterator[None]:
    try:
        yield
    except (ImportError, NotImplementedError, OSError, ValueError) as error:
        message = " ".join(str(error).split())
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)
        raise typer.Exit(2) from None


def _last_token_table(result: BackwardLensResult, kind: str) -> Table:
    from tl_backward.lens_result import READ_BY_INPUT
    from tl_backward.plotting import visible

    readout = result[kind]
    table = Table(
        title=f"{kind} at the last token {visible(result.str_tokens[-1])!r}",
        caption=(
            f"{BY_INPUT if kind in READ_BY_INPUT else BY_VJP}\nrank of {visible(result.target)!r}: "
            f"0 is the most probable token, {result.d_vocab - 1} the least"
        ),
        header_style="bold",
    )
    for name, width in (("layer", 5), ("norm", 6)):
        table.add_column(name, justify="right", min_width=width)
    for name in ("most probable", "least probable"):
        table.add_column(name)
    table.add_column("rank", justify="right", min_width=len(str(result.d_vocab)))
    top, bottom = readout.top_tokens(), readout.bottom_tokens()
    for i, layer in enumerate(readout.layers):
        table.add_row(
            str(layer),
            f"{readout.norms[i, -1]:.3g}",
            *(escape("  ".join(map(visible, end[i][-1][:TOKENS_SHOWN]))) for end in (top, bottom)),
            "-" if readout.zero_mask[i, -1] else str(int(readout.target_ranks[i, -1])),
        )
    return table


def _as_json(
    result: BackwardLensResult, prompt: str, target: str, model: str | None
) -> dict[str, Any]:
    rows = json.loads(result.to_dataframe().to_json(orient="records"))
    return {
        "model": model or DEFAULT_MODEL,
        "prompt": prompt,
        "str_tokens": result.str_tokens,
        "target": target,
        "target_id": int(result.target_ids),
        "loss": result.loss.item(),
        "rows": rows,
    }


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in _split(text)]
    except ValueError:
        raise ValueError(f"--layers takes whole numbers such as 0,5,-1, got {text!r}") from None


if __name__ == "__main__":
    app(prog_name="python -m tl_backward")
