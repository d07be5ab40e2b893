"""``python -m tl_backward lens``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from tl_backward.commands.checks import (
    integers,
    parts,
    require_model_folder,
    require_texts,
    require_writable,
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
    from tl_backward.lens.result import BackwardLensResult

TOKENS_SHOWN = 3
BY_INPUT = "read by its inputs: the most probable tokens are imprinted"
BY_VJP = "read by its VJPs: a step moves towards the least probable tokens"


def lens(
    prompt: Annotated[str, typer.Argument(help="Text to run the model on.", show_default=False)],
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
        int, typer.Option(help="Tokens to keep at each end of the vocabulary.", metavar="K", min=1)
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
    bos: BosOption = None,
) -> None:
    """Show what the gradient of -log p(target | prompt) would write into each layer.

    Prints a table for the last token; `--html` and `--json` keep all positions. All but the last
    token of a target are appended to the prompt. Each position then ranks the target token that it
    predicts (the table: the last one), and other positions rank the first.
    """
    console = console_for_output()
    with exit_code_2_on_bad_input():
        require_texts(prompt=prompt, target=target)
        require_writable(html=html, json=json_path)
        require_model_folder(model)
        kinds = parts(weights, "--weights")
        indices = None if layers is None else integers(layers, "--layers")
        with progress(console, "loading the libraries") as go_on_with:
            from tl_backward import BackwardLogitLens
            from tl_backward.capture.bos import prepends_bos

            go_on_with(f"loading {model or DEFAULT_MODEL}")
            read = BackwardLogitLens(load(model))
            prepend_bos = prepends_bos(read.model, bos)
            go_on_with("reading the gradients")
            result = read(
                prompt,
                target,
                weights=kinds,
                layers=indices,
                top_k=top_k,
                prepend_bos=prepend_bos,
            )
        for kind in result:
            console.print(_last_token_table(result, kind))
        console.print(
            f"{prompt!r} -> {target!r}: "
            f"loss {result.loss:.4f} nats per token, exp(-loss) = {result.loss.neg().exp():.2g}; "
            f"{with_or_without_bos(prepend_bos)}"
        )
        if json_path:
            written = json.dumps(
                _as_json(result, prompt, target, model) | {"prepend_bos": prepend_bos}
            )
            json_path.write_text(written, encoding="utf-8")
            console.print(f"all positions as JSON: {json_path.resolve()}")
        if html:
            page = result.to_html(html).resolve()
            console.print(f"all positions as a page, open it in a browser: {page.as_uri()}")


def _last_token_table(result: BackwardLensResult, kind: str) -> Table:
    from tl_backward.plotting import visible
    from tl_backward.sites.kinds import reads_stream

    readout = result[kind]
    ranked = result.target if isinstance(result.target, str) else result.target[-1]
    table = Table(
        title=f"{kind} at the last token {visible(result.str_tokens[-1])!r}",
        caption=(
            f"{BY_INPUT if reads_stream(kind) else BY_VJP}\nrank of {visible(ranked)!r}: "
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
            *("  ".join(map(visible, end[i][-1][:TOKENS_SHOWN])) for end in (top, bottom)),
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
        "target_id": result.target_ids.tolist(),
        "loss": result.loss.item(),
        "left_out": result.left_out,
        "rows": rows,
    }
