"""Tables of evaluated methods, in the paper's form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from tl_backward.evaluation.metrics import FAMILIES, WANTED, harmonic_mean

if TYPE_CHECKING:
    import pandas as pd

SCORED = ("success", "accuracy")
PERCENT = 100
EXTRA = {"ngram_entropy": 100, "perplexity": 1}
"""Optional metrics, and their units in the paper."""


def summarise(results: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Mean and standard deviation of each method's metrics over its records.

    Args:
        results: Results of :func:`evaluate`, by name of the method.

    Returns:
        One row per method, with two levels of columns. ``("records", "measured")``: number of
        records with metrics; ``("records", "errors")``: number with an error (the best edit of a
        failed search counts in both); ``("records", "bos")``: share of records whose texts began
        with a BOS token (all or none in one evaluation). Under ``"success"``, ``"magnitude"`` and
        ``"accuracy"``: ``efficacy``, ``paraphrase`` and ``neighborhood`` in per cent, each with a
        population standard deviation ``..._std``; for success and accuracy also ``score``, the
        harmonic mean of the three means. Under ``"text"``, if measured: ``ngram_entropy`` in bits
        times 100, and ``perplexity``.

    Raises:
        ValueError: If there are no results.
    """
    import pandas as pd

    if not results:
        raise ValueError("results is empty; pass at least one method's table")
    rows = {name: _row(frame) for name, frame in results.items()}
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    summary = pd.DataFrame.from_dict(rows, orient="index")
    return summary.reindex(columns=pd.MultiIndex.from_tuples(columns))


def _row(frame: pd.DataFrame) -> dict[tuple[str, str], float]:
    measured = frame["efficacy_success"].notna() if "efficacy_success" in frame else frame.index < 0
    row: dict[tuple[str, str], float] = {
        ("records", "measured"): float(measured.sum()),
        ("records", "errors"): float(frame["error"].notna().sum()),
    }
    if "prepend_bos" in frame:
        row["records", "bos"] = float(frame["prepend_bos"].mean())
    for family in FAMILIES:
        means = []
        for kind in WANTED:
            row |= _mean_and_std(frame, f"{kind}_{family}", (family, kind), PERCENT)
            means.append(row[family, kind])
        if family in SCORED:
            row[family, "score"] = harmonic_mean(means)
    for column, unit in EXTRA.items():
        if column in frame:
            row |= _mean_and_std(frame, column, ("text", column), unit)
    return row


def _mean_and_std(
    frame: pd.DataFrame, column: str, name: tuple[str, str], unit: int
) -> dict[tuple[str, str], float]:
    import pandas as pd

    values = frame[column].astype(float) if column in frame else pd.Series(dtype=float)
    family, metric = name
    return {
        name: unit * float(values.mean()),
        (family, f"{metric}_std"): unit * float(values.std(ddof=0)),
    }


def table(results: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Format :func:`summarise` as text, with ``mean (std)`` in one cell.

    Args:
        results: Results of :func:`evaluate`, by name of the method.

    Returns:
        Texts with two decimals; a dash for missing values. ``("records", "bos")`` is yes, no or
        mixed.

    Raises:
        ValueError: As :func:`summarise`.

    Example:
        >>> print(table({"unedited": before, "shift": after}).to_string())
    """
    summary = summarise(results)
    texts = summary[[]].copy()
    for family, metric in summary.columns.to_flat_index():
        if metric.endswith("_std"):
            continue
        values = summary[family, metric]
        if metric == "bos":
            texts[family, metric] = values.map(
                lambda share: "-" if math.isnan(share) else {0: "no", 1: "yes"}.get(share, "mixed")
            )
            continue
        stds = summary.get((family, f"{metric}_std"))
        texts[family, metric] = [
            _text(value, None if stds is None else stds.iloc[i], whole=family == "records")
            for i, value in enumerate(values)
        ]
    return texts


def _text(value: float, std: float | None, whole: bool) -> str:
    if value != value:
        return "-"
    if whole:
        return f"{value:.0f}"
    return f"{value:.2f}" if std is None else f"{value:.2f} ({std:.2f})"
