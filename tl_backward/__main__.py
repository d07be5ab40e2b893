"""The command line: ``python -m tl_backward``."""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Any

import typer
from typer.core import TyperGroup

from tl_backward.commands.adapter import adapter
from tl_backward.commands.diff import diff
from tl_backward.commands.edit import edit
from tl_backward.commands.evaluate import evaluate
from tl_backward.commands.lens import lens
from tl_backward.commands.reproduce import reproduce
from tl_backward.commands.sites import sites


class Commands(TyperGroup):
    """The command group; arguments must be UTF-8."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse arguments that are not valid UTF-8."""
        for argument in args:
            try:
                argument.encode()
            except UnicodeEncodeError:
                raise typer.BadParameter(f"{argument!a} is not valid UTF-8") from None
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def main() -> None:
    """Read a language model's backward pass in its own vocabulary, and edit what you see."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # None if the shell closed it
            stream.reconfigure(errors="backslashreplace")  # tokens may not fit the encoding


FACT = '"Lionel Messi plays for" --target " Paris"'
app.command(epilog=f"Example: python -m tl_backward lens {FACT} --layers 20,-1 --html paris.html")(
    lens
)
app.command(epilog=f"Example: python -m tl_backward edit {FACT} --layer 24")(edit)
app.command(
    epilog="Example: python -m tl_backward evaluate --data counterfact.json --layer 24 -n 100"
)(evaluate)
app.command(
    epilog="Example: python -m tl_backward reproduce gradient_rank --data counterfact.json -n 20"
)(reproduce)
app.command(epilog="Example: python -m tl_backward diff gpt2 my-gpt2 --html difference.html")(diff)
app.command(epilog="Example: python -m tl_backward adapter my-lora --model gpt2")(adapter)
app.command(epilog="Example: python -m tl_backward sites --model gpt2")(sites)

if __name__ == "__main__":
    app(prog_name="python -m tl_backward")
