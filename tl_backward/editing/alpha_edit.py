"""AlphaEdit: MEMIT with updates that preserve the outputs of usual inputs (Fang et al. 2025)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.capture.tokens import Target
from tl_backward.editing._kernel import kernel
from tl_backward.editing._mlp_outputs import w_out_sites
from tl_backward.editing._settings import require_positive
from tl_backward.editing._value_search import SearchSettings
from tl_backward.editing.editor_report import EditorReport
from tl_backward.editing.key_statistics import KeyStatistics, require_statistics
from tl_backward.editing.memit import spread
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.sites import Model, WeightSite

FRACTION = 0.7
"""Approximate share of eigenvectors that AlphaEdit keeps, according to its authors."""


def alpha_edit(
    model: Model,
    prompts: Sequence[str],
    targets: Target,
    *,
    subjects: Sequence[str],
    layers: int | Iterable[int],
    statistics: KeyStatistics | None = None,
    l2: int | float = 10.0,
    null_space: Mapping[str, Float[Tensor, "d_in d_in"]] | None = None,
    earlier: Sequence[WeightEdit] = (),
    contexts: Sequence[Sequence[str]] | None = None,
    steps: int = 25,
    lr: int | float = 0.1,
    decay: int | float = 0.5,
    kl: int | float = 0.0625,
    clamp: int | float = 0.75,
    prepend_bos: bool | None = None,
) -> WeightEdit:
    """Make targets follow prompts with AlphaEdit's updates of W_out in several layers.

    Works as :func:`memit`, with the update ``(P K_all K_all^T + l2 I)^-1 P K R``. ``P`` projects
    onto directions that are rare in usual inputs; ``K_all`` holds the keys of these facts and of
    earlier ones, whose outputs are preserved. The defaults are those of the published code for
    Llama 3 8B (layers 4 to 8 there).

    Args:
        model: A TransformerLens model in eval mode, with the earlier edits in place. It is left
            unchanged: see :class:`WeightEdit`.
        prompts: As for :func:`memit`.
        targets: The same.
        subjects: The same.
        layers: The same.
        statistics: ``C``, from :func:`key_statistics`, to compute ``P``; None if ``null_space`` is
            given.
        l2: Added to the diagonal; a larger one makes smaller changes.
        null_space: Projectors ``P`` by site name. Default: onto the rarest 70 % of directions,
            ``statistics.null_space(name, fraction=0.7)``. The published code uses
            ``statistics.null_space(name, threshold=0.02)``, a bound for Llama 3's inputs.
        earlier: Earlier edits by this function on this model, in the same layers.
        contexts: As for :func:`memit`.
        steps: As for :func:`rome`.
        lr: The same.
        decay: The same.
        kl: The same.
        clamp: The same.
        prepend_bos: The same.

    Returns:
        The edit, not applied, with an :class:`EditorReport` in ``edit.report``.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: As for :func:`memit`; for a
            missing or unsuitable projector; and for earlier edits without the keys of these layers
            (sums, multiples and loaded edits have none).

    Warns:
        UserWarning: As for :func:`rome`.

    Example:
        >>> first = alpha_edit(model, ["Lionel Messi plays for"], " Paris", layers=[3, 4, 5],
        ...                    subjects=["Lionel Messi"], statistics=statistics)
        >>> first.apply()
        >>> second = alpha_edit(model, ["Rome is the capital of"], " France", layers=[3, 4, 5],
        ...                     subjects=["Rome"], statistics=statistics, earlier=[first])
    """
    require_positive(l2=l2)
    if isinstance(earlier, WeightEdit):
        raise TypeError("earlier must be a list of edits, got one edit; pass [edit]")
    sites = w_out_sites(model, layers)
    projectors = _projectors(model, sites, statistics, null_space)
    known = {site.name: _earlier_keys(site, earlier) for site in sites}

    def rows(site: WeightSite, keys: Tensor) -> Tensor:
        every = torch.cat([keys.to(device="cpu", dtype=torch.float64), *known[site.name]])
        return kernel(every, lambda x: x @ projectors[site.name], ridge=l2)[: len(keys)]

    settings = SearchSettings(steps, lr, decay, kl, clamp)
    return spread(model, prompts, targets, subjects, sites, rows, contexts, settings, prepend_bos)


def _projectors(
    model: Model,
    sites: Sequence[WeightSite],
    statistics: KeyStatistics | None,
    null_space: Mapping[str, Float[Tensor, "d_in d_in"]] | None,
) -> dict[str, Float[Tensor, "d_in d_in"]]:
    """The projector of each site, in float64 on the CPU."""
    if null_space is None:
        if statistics is None:
            raise ValueError("null_space: pass it, or statistics to get it from")
        require_statistics(statistics, model, sites)
        return {site.name: statistics.null_space(site.name, fraction=FRACTION) for site in sites}
    projectors = {}
    for site in sites:
        if site.name not in null_space:
            raise ValueError(
                f"null_space has no projector for {site.name}, only for {', '.join(null_space)}"
            )
        P = null_space[site.name].to(device="cpu", dtype=torch.float64)
        if P.shape != (site.d_in, site.d_in) or not torch.allclose(P, P.mT):
            raise ValueError(
                f"null_space: the projector for {site.name} must be a symmetric "
                f"[{site.d_in}, {site.d_in}] matrix, got {list(P.shape)}"
            )
        projectors[site.name] = P
    return projectors


def _earlier_keys(
    site: WeightSite, earlier: Sequence[WeightEdit]
) -> list[Float[Tensor, "fact d_in"]]:
    """The keys of earlier edits' facts at a site."""
    found = []
    for i, edit in enumerate(earlier):
        if not isinstance(edit.report, EditorReport) or site.name not in edit.report.keys:
            raise ValueError(
                f"earlier: edit {i} has no keys of {site.name} in its report; pass the original "
                "edits that alpha_edit returned for these layers"
            )
        found.append(edit.report.keys[site.name].to(device="cpu", dtype=torch.float64))
    return found
