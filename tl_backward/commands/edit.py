"""``python -m tl_backward edit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from tl_backward.commands.shared import (
    DEFAULT_MODEL,
    ModelOption,
    console_for_output,
    exit_code_2_on_bad_input,
    load,
)

TOKENS_SHOWN = 5


def edit(
    prompt: Annotated[str, typer.Argument(help="Text that is to be continued otherwise.")],
    target: Annotated[
        str, typer.Option(help="What it is to be continued with: mind the leading space.")
    ],
    layer: Annotated[str, typer.Option(help="Layer of W_out, or 'auto'.")] = "auto",
    lr: Annotated[str, typer.Option(help="Step, or 'auto': the smallest that succeeds.")] = "auto",
    model: ModelOption = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", metavar="N")] = 12,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the edit (safetensors).", metavar="FILE", show_default=False),
    ] = None,
) -> None:
    """Shift W_out towards a target by one forward pass, and show the model before and after.

    No weight of the model on disk is changed; `--save` keeps the edit itself.
    """
    console = console_for_output()
    with exit_code_2_on_bad_input():
        at, step = _number(layer, "--layer", int), _number(lr, "--lr", float)
        with console.status("loading the libraries") as status:
            from tl_backward.editing import forward_pass_shift

            status.update(f"loading {model or DEFAULT_MODEL}")
            bridge = load(model)
            status.update("editing")
            made = forward_pass_shift(bridge, prompt, target, layer=at, lr=step)
            report = made.report
            table = Table("", "next tokens", "text", header_style="bold")
            table.add_row("before", *_continued(bridge, prompt, new_tokens))
            with made.applied():
                table.add_row("after", *_continued(bridge, prompt, new_tokens))
        if all(report.skipped):
            console.print(f"{escape(repr(target))} is predicted already: nothing was edited")
            return
        console.print(table)
        console.print(
            f"W_out of layer {', '.join(map(str, report.layers))}: lr {report.lr:.4g}, Frobenius "
            f"norm of the update {made.norm():.4g}; {report.n_passes} forward passes and "
            f"{report.n_upper_passes} through the upper layers"
        )
        if save:
            console.print(f"the edit: {escape(str(made.save(save).resolve()))}")


def _continued(model: Any, prompt: str, new_tokens: int) -> tuple[str, str]:
    """The most probable next tokens with their probabilities, and the greedy continuation."""
    import torch

    from tl_backward.plotting import visible

    with torch.no_grad():
        top = model(prompt, return_type="logits")[0, -1].float().softmax(-1).topk(TOKENS_SHOWN)
    strings = model.tokenizer.batch_decode(top.indices.unsqueeze(-1))
    tokens = (f"{visible(s)} {p:.2f}" for s, p in zip(strings, top.values.tolist(), strict=True))
    text = model.generate(prompt, max_new_tokens=new_tokens, do_sample=False, verbose=False)
    return escape("  ".join(tokens)), escape(text)


def _number(text: str, option: str, kind: type) -> Any | Literal["auto"]:
    if text == "auto":
        return text
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{option} takes a number or 'auto', got {text!r}") from None
