"""The backward lens on one page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl_backward._integers import as_ranges
from tl_backward.plotting.tables import LensTables
from tl_backward.plotting.tokens import visible

if TYPE_CHECKING:
    from jinja2 import Environment

VALUE_NAMES = {"logit": "logit", "log_prob": "log prob", "probability": "prob"}
"""No longer than the numbers below them, so that a card fits on a narrow screen."""


def lens_page(shown: LensTables) -> str:
    """One self-contained HTML page with a layer x token table for each weight.

    The last layer is on top. A cell shows the token at the top and at the bottom and is coloured by
    the norm of the VJP, on a cube-root scale from 0 to the largest norm in its table; pointing at
    it, or focusing it, shows its ``top_k`` tokens. Where the update is exactly zero it is empty.

    Raises:
        ImportError: Without the extra ``plot``.
        ValueError: When the lens kept no tokens.
    """
    template = environment().get_template("lens.html.j2")
    return template.render(shown=shown, value=VALUE_NAMES[shown.value])


def environment() -> Environment:
    """The templates, with what they use.

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
