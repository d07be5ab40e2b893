"""Edits in the vocabulary: the singular directions of what they add to each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward._integers import is_integer
from tl_backward.factors import FactoredSVD, GradientFactors
from tl_backward.lens.readout import VALUE_COLUMNS, Readout
from tl_backward.plotting.edit_tables import EditCell, EditTable, Reading
from tl_backward.sites import FoundSites, Model
from tl_backward.sites.kinds import is_read_by_input, require_beside_the_stream
from tl_backward.sites.names import parse_site_name

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

OUTSIDE = {"W_E": "embed", "W_pos": "pos_embed", "W_U": "unembed"}
INTEGERS = dict.fromkeys(("layer", "target_rank"), "Int64")


@runtime_checkable
class Factored(Protocol):
    """What has factors by site name: an edit."""

    factors: dict[str, GradientFactors]


class Direction(NamedTuple):
    """One singular direction of what an edit adds to a weight.

    Attributes:
        site: Name of the site.
        number: Its place at the site: 0 has the largest singular value.
        norm: Frobenius norm of all that the edit adds there.
        singular_value: Its own norm.
        share: Its share of the energy there, ``(singular_value / norm)^2``.
        vector: The unit vector on the side of the residual stream.
        feature: The strongest component of the unit vector on the other side, in words.
        feature_index: Its index.
        feature_value: Its value, which is positive: that fixes the sign of the two vectors.
    """

    site: str
    number: int
    norm: float
    singular_value: float
    share: float
    vector: Float[Tensor, "d_model"]
    feature: str
    feature_index: int
    feature_value: float


@dataclass(frozen=True, eq=False)
class EditReadout:
    """The leading singular directions of an edit at every site, in the vocabulary.

    A direction adds ``s u^T v`` to ``W``: of an input ``x`` the output changes by ``s (x . u) v``.
    ``u`` and ``v`` have a common sign only, which is chosen so that the strongest component of the
    vector on the other side than the residual stream is positive: its *feature*, a neuron or a
    dimension of a head. So the two ends of the readout go with two kinds of inputs:

    - of a weight that writes to the stream (W_out, W_O), inputs in which the feature is positive
      move the stream towards the tokens at the *top*, and those in which it is negative towards the
      tokens at the *bottom*;
    - of one that reads it (W_in, W_gate, W_Q, W_K, W_V), streams like the tokens at the *top* raise
      the feature, and streams like those at the *bottom* lower it.

    Where a post-norm follows the weight (Gemma 2 and 3, OLMo 2 ...), vectors are read before it.

    Attributes:
        directions: The directions, site by site in the order of the edit.
        readout: Their readout, one entry for each.
        value: The name of the tokens' values: ``log_prob``, ``logit`` or ``probability``.
        norms: By site, the Frobenius norm of what the edit adds.
    """

    directions: list[Direction]
    readout: Readout
    value: str
    norms: dict[str, float]

    def __repr__(self) -> str:
        return f"EditReadout({len(self.norms)} weights, {len(self.directions)} directions)"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per direction and token that was kept.

        Columns: ``site, weight, layer, direction, norm, singular_value, share, feature,
        feature_index, feature_value``, ``end`` (``top`` or ``bottom``), ``input`` (the sign of the
        feature that goes with this end), ``k, token_id, token``, the value, and ``target_rank``
        where the lens was run with one target.
        """
        import pandas as pd

        frame = pd.DataFrame(line for i in range(len(self.directions)) for line in self._lines(i))
        return frame.astype({name: kind for name, kind in INTEGERS.items() if name in frame})

    def plot(self) -> Figure:
        """A plotly figure, layers x weights, coloured by norm, with all tokens when pointed at.

        Raises:
            ImportError: Without the extra ``plot``.
            ValueError: When no tokens were kept.
        """
        from tl_backward.plotting import edit_figure

        return edit_figure(self.table())

    def to_html(self, path: str | Path) -> Path:
        """Write the figure, and what it shows, as one self-contained page.

        Returns:
            The path of the page.

        Raises:
            ImportError: Without the extra ``plot``.
            ValueError: When no tokens were kept.
        """
        from tl_backward.plotting import edit_page

        path = Path(path)
        path.write_text(edit_page(self.table()), encoding="utf-8")
        return path

    def table(self) -> EditTable:
        """What figures and pages show, as plain data.

        Raises:
            ValueError: When no tokens were kept.
        """
        if not self.readout.top_ids.shape[-1] or not self.readout.bottom_ids.shape[-1]:
            raise ValueError("a figure needs top_k and bottom_k of at least 1, in lens.edit")
        readings: dict[str, list[Reading]] = {}
        top, bottom = self.readout.top_tokens(), self.readout.bottom_tokens()
        for i, one in enumerate(self.directions):
            reading = Reading(one.singular_value, one.share, one.feature, top[i], bottom[i])
            readings.setdefault(one.site, []).append(reading)
        cells = [
            EditCell(_header(site), _weight(site), self.norms[site], of_site)
            for site, of_site in readings.items()
        ]
        return EditTable(cells)

    def _lines(self, i: int) -> list[dict[str, Any]]:
        one, readout = self.directions[i], self.readout
        name = parse_site_name(one.site)
        of_direction = {
            "site": one.site,
            "weight": name.kind,
            "layer": name.layer,
            "direction": one.number,
            "norm": one.norm,
            "singular_value": one.singular_value,
            "share": one.share,
            "feature": one.feature,
            "feature_index": one.feature_index,
            "feature_value": one.feature_value,
        }
        if readout.target_ranks.ndim == 1:
            of_direction["target_rank"] = int(readout.target_ranks[i])
        ends = (
            ("top", "+", readout.top_ids[i], readout.top_values[i]),
            ("bottom", "-", readout.bottom_ids[i], readout.bottom_values[i]),
        )
        return [
            {
                **of_direction,
                "end": end,
                "input": sign,
                "k": k,
                "token_id": token,
                "token": readout.vocabulary[token],
                self.value: value,
            }
            for end, sign, ids, values in ends
            for k, (token, value) in enumerate(zip(ids.tolist(), values.tolist(), strict=True))
        ]


def directions_of(
    model: Model, found: FoundSites, edit: Factored, k: int
) -> tuple[list[Direction], dict[str, float]]:
    """The leading directions at every site, and the norm of each site.

    Directions within rounding of zero are left out.

    Raises:
        ValueError: When the edit is empty, or of another model, or one of its weights has the
            residual stream on neither side; and when ``k`` is no positive integer.
    """
    if not is_integer(k) or k < 1:
        raise ValueError(f"k must be a positive integer, got {k!r}")
    _require_fitting(found, edit.factors)
    directions: list[Direction] = []
    norms: dict[str, float] = {}
    for site, g in edit.factors.items():
        svd = g.svd()
        total = torch.linalg.vector_norm(svd.S)
        norms[site] = float(total)
        by_input = is_read_by_input(parse_site_name(site).kind)
        for i in range(min(k, _n_nonzero(svd, g))):
            u, v, s = svd.U[:, i], svd.Vh[i], float(svd.S[i])
            vector, other = (u, v) if by_input else (v, u)
            feature = int(other.abs().argmax())
            sign = other[feature].sign()
            directions.append(
                Direction(
                    site=site,
                    number=i,
                    norm=float(total),
                    singular_value=s,
                    share=(s / float(total)) ** 2,
                    vector=sign * vector,
                    feature=_in_words(model, site, feature),
                    feature_index=feature,
                    feature_value=float(sign * other[feature]),
                )
            )
    return directions, norms


def edit_readout(
    directions: list[Direction], norms: Mapping[str, float], readout: Readout, return_type: str
) -> EditReadout:
    """The directions with what was read of them."""
    return EditReadout(directions, readout, VALUE_COLUMNS[return_type], dict(norms))


def label_of(direction: Direction) -> str:
    """What the entry of a direction is called."""
    return f"{direction.site} direction {direction.number}"


def _require_fitting(found: FoundSites, factors: Mapping[str, GradientFactors]) -> None:
    sites = {site.name: site for site in found.sites}
    if not factors:
        raise ValueError("edit: it is empty, so there is nothing to read")
    for name, g in factors.items():
        require_beside_the_stream(name)
        site = sites.get(name)
        if site is None or g.shape != (site.d_in, site.d_out):
            has = "has no such weight" if site is None else f"has [{site.d_in}, {site.d_out}] there"
            raise ValueError(
                f"edit: it is of another model: its {name} is {list(g.shape)}, and the model of "
                f"the lens {has}"
            )
        if not (g.inputs.isfinite().all() and g.vjps.isfinite().all()):
            raise ValueError(f"edit: what it adds to {name} is not finite")


def _n_nonzero(svd: FactoredSVD, g: GradientFactors) -> int:
    """How many singular values are more than rounding noise, as :meth:`GradientFactors.rank`."""
    least = max(g.shape) * torch.finfo(svd.S.dtype).eps * svd.S[:1]
    return int((least < svd.S).sum())


def _in_words(model: Model, site: str, index: int) -> str:
    """What a component on the side that is not the residual stream stands for."""
    kind = parse_site_name(site).kind.partition(".")[0]
    if kind in ("W_E", "W_U"):
        return (
            f"token {index}" if model.tokenizer is None else repr(model.tokenizer.decode([index]))
        )
    if kind == "W_pos":
        return f"position {index}"
    if kind in ("W_Q", "W_K", "W_V", "W_O"):
        head, dimension = divmod(index, int(model.cfg.d_head))
        return f"head {head}, dimension {dimension}"
    return f"neuron {index}"


def _header(site: str) -> str:
    name = parse_site_name(site)
    return OUTSIDE.get(name.kind, name.kind) if name.layer is None else str(name.layer)


def _weight(site: str) -> str:
    """The kind, and the expert that it is of."""
    name = parse_site_name(site)
    if name.expert is not None:
        return f"{name.kind} of expert {name.expert}"
    return f"shared {name.kind}" if ".shared_experts." in site else name.kind
