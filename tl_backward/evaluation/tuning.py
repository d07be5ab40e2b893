"""The settings of an editing method, chosen by what its edits do to some records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tl_backward.evaluation.methods import Method
from tl_backward.evaluation.metrics import WANTED
from tl_backward.evaluation.records import Record
from tl_backward.evaluation.runner import evaluate
from tl_backward.evaluation.summary import summarise
from tl_backward.sites import Model

if TYPE_CHECKING:
    import pandas as pd


class Tuned(NamedTuple):
    """What :func:`tune` chose.

    Attributes:
        settings: The settings with the highest score.
        method: The method with these settings.
        table: One row for each setting: the settings, ``score`` in percent, ``efficacy``,
            ``paraphrase`` and ``neighborhood``, of which it is the harmonic mean, and ``errors``,
            how many records have one.
    """

    settings: dict[str, Any]
    method: Method
    table: pd.DataFrame


def tune(
    model: Model,
    records: Sequence[Record],
    make: Callable[..., Method],
    grid: Mapping[str, Iterable[Any]],
    *,
    path: str | Path | None = None,
    **options: Any,
) -> Tuned:
    """Choose a method's settings by the score of its edits, in the same way for every method.

    The score is the harmonic mean of the mean successes of efficacy, paraphrases and neighbours. A
    record that could not be measured counts as a failure in all three. Of settings with equal
    scores the first is taken.

    Args:
        model: A TransformerLens model in eval mode.
        records: Facts to choose by; not those that the method is to be measured on.
        make: Makes the method from settings, such as :func:`shift` or :func:`rome`.
        grid: By name of an argument of ``make``, the values to choose from. All combinations are
            tried.
        path: A folder for the tables of :func:`evaluate`, one for each setting; to resume from.
        options: Further arguments of :func:`evaluate`, such as ``size=10``.

    Raises:
        ValueError: When the grid or one of its lists is empty, when no record can be measured with
            any setting, and as :func:`evaluate`.
        TypeError: When ``make`` has no such argument, and as :func:`evaluate`.

    Example:
        >>> chosen = tune(model, records[1:], shift, {"layer": [22, 26], "lr": [0.1, 0.3]})
        >>> chosen.settings
        >>> evaluate(model, records[:1], chosen.method)
    """
    import pandas as pd

    values = {name: list(of_name) for name, of_name in grid.items()}
    if not values or not all(values.values()):
        raise ValueError(f"grid={grid!r}: name at least one argument, and a value for each")
    every = [dict(zip(values, one, strict=True)) for one in product(*values.values())]
    methods = [make(**settings) for settings in every]
    rows = []
    for i, (settings, method) in enumerate(zip(every, methods, strict=True)):
        folder = None if path is None else Path(path) / str(i)
        rows.append(settings | _outcome(evaluate(model, records, method, path=folder, **options)))
    table = pd.DataFrame(rows)
    if (table["measured"] == 0).all():
        raise ValueError(f"grid={grid!r}: no record could be measured; {rows[0]['first_error']}")
    best = int(table["score"].argmax())
    return Tuned(every[best], methods[best], table.drop(columns="first_error"))


def _outcome(frame: pd.DataFrame) -> dict[str, Any]:
    """The score of an evaluation, and what it is made of."""
    errors = frame["error"].dropna()
    successes = {f"{kind}_success": 0.0 for kind in WANTED}
    counted = frame.assign(**{name: frame.get(name, math.nan) for name in successes})
    summary = summarise({"": counted.fillna(successes)}).loc[""]
    return {
        "score": summary["success", "score"],
        **{kind: summary["success", kind] for kind in WANTED},
        "measured": int(counted["efficacy_success"].notna().sum()),
        "errors": len(errors),
        "first_error": errors.iloc[0] if len(errors) else None,
    }
