"""The command line: ``python -m tl_backward``."""

from __future__ import annotations

import typer

from tl_backward.commands.edit import edit
from tl_backward.commands.evaluate import evaluate
from tl_backward.commands.lens import lens
from tl_backward.commands.reproduce import reproduce
from tl_backward.commands.sites import sites

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback()
def main() -> None:
    """Read a language model's backward pass in its own vocabulary, and edit what you see."""


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
app.command(epilog="Example: python -m tl_backward sites --model gpt2")(sites)

if __name__ == "__main__":
    app(prog_name="python -m tl_backward")
