"""Where an edit writes, and what."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from tl_backward.factors import GradientFactors
from tl_backward.lens import BackwardLogitLens
from tl_backward.lens.edits import Factored
from tl_backward.sites import Model
from tl_backward.sites.kinds import is_read_by_input
from tl_backward.sites.names import parse_site_name

if TYPE_CHECKING:
    import pandas as pd

TOP_K = 5


class EditSummary(NamedTuple):
    """See :meth:`WeightEdit.summary`."""

    sites: pd.DataFrame
    tokens: pd.DataFrame


def summary_of(model: Model, edit: Factored, k: int) -> EditSummary:
    """See :meth:`WeightEdit.summary`."""
    import pandas as pd

    read = BackwardLogitLens(model).edit(edit, k=k, top_k=TOP_K)
    total = sum(norm**2 for norm in read.norms.values()) or 1.0
    rows = read.to_dataframe()
    rows["energy"] = rows.singular_value**2 / total
    rows["side"] = ["reads" if is_read_by_input(kind) else "writes" for kind in rows.weight]
    of_tokens = (
        rows.drop_duplicates(["site", "direction", "token_id"])
        .groupby(["side", "token_id"], sort=False)
        .agg(
            token=("token", "first"),
            n_directions=("energy", "size"),
            energy_share=("energy", "sum"),
        )
        .sort_values(["n_directions", "energy_share"], ascending=False, kind="stable")
        .reset_index()
    )
    first = rows[rows.direction == 0].groupby(["site", "end"]).token.agg(list)
    of_sites = [
        {
            "site": name,
            "weight": parse_site_name(name).kind,
            "layer": parse_site_name(name).layer,
            "norm": read.norms[name],
            "energy_share": read.norms[name] ** 2 / total,
            "rank": g.rank(),
            "effective_rank": _effective_rank(g),
            "top": first.get((name, "top"), []),
            "bottom": first.get((name, "bottom"), []),
        }
        for name, g in edit.factors.items()
    ]
    sites = pd.DataFrame(of_sites).astype({"layer": "Int64"})
    return EditSummary(
        sites.sort_values("norm", ascending=False, kind="stable").reset_index(drop=True), of_tokens
    )


def _effective_rank(g: GradientFactors) -> float:
    """The exponential of the entropy of the directions' shares of the energy."""
    shares = g.singular_values().square()
    shares = shares[shares > 0] / shares.sum()
    return float((-(shares * shares.log()).sum()).exp()) if len(shares) else 0.0
