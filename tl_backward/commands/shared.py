"""Options and helpers shared by the commands."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tl_backward.commands.checks import require_model_folder

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
ModelOption = Annotated[
    str | None,
    typer.Option(
        help="Hub name or local folder, as for TransformerBridge.boot_transformers.",
        show_default=DEFAULT_MODEL,
    ),
]
BosOption = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Begin texts with a BOS token.",
        show_default="as the model's tokenizer does",
    ),
]
WIDTH_IN_A_PIPE = 120


def console_for_output() -> Console:
    """A console as wide as the terminal, or wide enough for the tables in a pipe; no markup."""
    width = None if Console().is_terminal else WIDTH_IN_A_PIPE
    return Console(width=width, markup=False, emoji=False)


def load(model: str | None, option: str = "--model") -> Any:
    """Load the requested model, by default the demo model."""
    require_model_folder(model, option)
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError as error:
        raise ImportError(
            "the command line needs TransformerBridge, which this TransformerLens does not have: "
            "pip install 'transformer-lens>=3.9'"
        ) from error
    if model is None:
        from tl_backward.demo_model import load_demo_model

        return load_demo_model()
    try:
        return TransformerBridge.boot_transformers(model).eval()
    except Exception as error:  # a damaged model can raise anything
        raise ValueError(
            f"cannot load {option} {model}: {error or type(error).__name__}"
        ) from error


def with_or_without_bos(bos: bool) -> str:
    """The output's note on BOS tokens."""
    return f"texts {'with' if bos else 'without'} a BOS token"


@contextmanager
def exit_code_2_on_bad_input() -> Iterator[None]:
    """End the program with one paragraph on bad input; show each warning as a paragraph, too."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _print_paragraph(
            "warning:", "bold yellow", str(message)
        )
        try:
            yield
        except BrokenPipeError:
            raise  # typer ends the program
        except (ImportError, NotImplementedError, OSError, ValueError) as error:
            _print_paragraph("error:", "bold red", str(error) or type(error).__name__)
            raise typer.Exit(2) from None


def _print_paragraph(label: str, style: str, text: str) -> None:
    paragraph = Text.assemble((label, style), " ", " ".join(text.split()))
    Console(stderr=True).print(paragraph, soft_wrap=True)


@contextmanager
def progress(console: Console, text: str) -> Iterator[Callable[[str], None]]:
    """Show a status on a terminal; yields a function that updates it."""
    with console.status(Text(text)) as status:
        yield lambda text: status.update(Text(text))
