"""What the commands have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Hub name or local folder, as TransformerBridge.boot_transformers takes it.",
        show_default=DEFAULT_MODEL,
    ),
]
WIDTH_IN_A_PIPE = 120


def console_for_output() -> Console:
    """As wide as the terminal, and in a pipe wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_IN_A_PIPE)


def load(model: str | None) -> Any:
    """The model that was asked for, or the embedded default."""
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
def exit_code_2_on_bad_input() -> Iterator[None]:
    """Bad input ends the program with one paragraph."""
    try:
        yield
    except (ImportError, NotImplementedError, OSError, ValueError) as error:
        message = " ".join(str(error).split())
        Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", highlight=False)
        raise typer.Exit(2) from None


def split(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def integers(text: str) -> list[int]:
    """The whole numbers of a list with commas."""
    try:
        return [int(part) for part in split(text)]
    except ValueError:
        raise ValueError(f"--layers takes whole numbers such as 0,5,-1, got {text!r}") from None
