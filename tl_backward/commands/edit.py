"""``python -m tl_backward edit``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from tl_backward.commands.checks import (
    number_or_auto,
    require_model_folder,
    require_replaceable,
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

TOKENS_SHOWN = 5


def edit(
    prompt: Annotated[str, typer.Argument(help="Text whose continuation to change.")],
    target: Annotated[str, typer.Option(help="New continuation: mind the leading space.")],
    layer: Annotated[str, typer.Option(help="Layer of W_out, or 'auto'.")] = "auto",
    lr: Annotated[str, typer.Option(help="Step, or 'auto': the smallest that succeeds.")] = "auto",
    model: ModelOption = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", metavar="N", min=1)] = 12,
    save: Annotated[
        Path | None,
        typer.Option(help="Write the edit (safetensors).", metavar="FILE", show_default=False),
    ] = None,
    bos: BosOption = None,
) -> None:
    """Shift W_out towards a target with one forward pass, and show the model before and after.

    The model on disk is not changed; `--save` writes the edit itself.
    """
    console = console_for_output()
    with exit_code_2_on_bad_input():
        require_texts(prompt=prompt, target=target)
        at = number_or_auto(layer, "--layer", int)
        step = number_or_auto(lr, "--lr", float)
        require_writable(save=save)
        require_replaceable(save=save)
        require_model_folder(model)
        with progress(console, "loading the libraries") as go_on_with:
            from tl_backward.capture.bos import prepends_bos
            from tl_backward.editing import forward_pass_shift

            go_on_with(f"loading {model or DEFAULT_MODEL}")
            bridge = load(model)
            prepend_bos = prepends_bos(bridge, bos)
            table = Table("", "next tokens", "text", header_style="bold")
            table.add_row("before", *_continued(bridge, prompt, new_tokens, prepend_bos))
            go_on_with("editing")
            made = forward_pass_shift(
                bridge, prompt, target, layer=at, lr=step, prepend_bos=prepend_bos
            )
            report = made.report
            with made.applied():
                table.add_row("after", *_continued(bridge, prompt, new_tokens, prepend_bos))
        if all(report.skipped):
            console.print(f"{target!r} is already predicted: nothing was edited")
            return
        console.print(table)
        console.print(
            f"W_out of layer {', '.join(map(str, report.layers))}: lr {report.lr:.4g}, Frobenius "
            f"norm of the update {made.norm():.4g}; {report.n_passes} forward passes and "
            f"{report.n_upper_passes} through the upper layers; {with_or_without_bos(prepend_bos)}"
        )
        if save:
            console.print(f"the edit: {made.save(save).resolve()}")


def _continued(model: Any, prompt: str, new_tokens: int, bos: bool) -> tuple[str, str]:
    """The most probable next tokens with their probabilities, and the greedy continuation."""
    import torch

    from tl_backward.evaluation import generate_tokens
    from tl_backward.plotting import visible

    tokenizer, tokens = model.tokenizer, model.to_tokens(prompt, prepend_bos=bos, truncate=False)
    with torch.no_grad():
        top = model(tokens)[0, -1].float().softmax(-1).topk(TOKENS_SHOWN)
    strings = tokenizer.batch_decode(top.indices.unsqueeze(-1))
    likely = (f"{visible(s)} {p:.2f}" for s, p in zip(strings, top.values.tolist(), strict=True))
    text = generate_tokens(model, tokens, new_tokens)[0].tolist()
    end = tokenizer.eos_token_id
    if end in text[tokens.shape[1] :]:
        text = text[: text.index(end, tokens.shape[1])]
    return "  ".join(likely), tokenizer.decode(text, skip_special_tokens=True)
