"""The HTML page of a lens result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_backward._integers import as_ranges
from tl_backward.plotting.tables import LensTables
from tl_backward.plotting.tokens import visible

if TYPE_CHECKING:
    from jinja2 import Environment

VALUE_NAMES = {"logit": "logit", "log_prob": "log prob", "probability": "prob"}
"""Short names, no wider than the numbers below them, so that a card fits a narrow screen."""


def lens_page(shown: LensTables) -> str:
    """One self-contained HTML page with a layer x token table for each weight.

    The last layer is on top. A cell shows the top and the bottom token. Its colour is the norm of
    the VJP, on a cube-root scale from 0 to the largest norm in the table. Hovering over it or
    focusing it shows its ``top_k`` tokens. Cells with an update of exactly zero are empty.

    Raises:
        ImportError: Without the extra ``plot``.
        ValueError: If the lens kept no tokens.
    """
    template = environment().get_template("lens.html.j2")
    return template.render(shown=shown, value=VALUE_NAMES[shown.value])


def environment() -> Environment:
    """The Jinja environment of the templates, with their filters and globals.

    Raises:
        ImportError: Without the extra ``plot``.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("pages need Jinja2: pip install 'tl-backward[plot]'") from error

    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("tl_backward"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    templates.filters["visible"] = visible
    templates.filters["ranges"] = as_ranges
    templates.globals["zip"] = zip
    return templates
