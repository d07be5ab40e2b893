"""MEMIT: many facts, written into several layers (Meng et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import TypeAlias

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from tl_backward.capture.tokens import Target
from tl_backward.editing._kernel import kernel, update
from tl_backward.editing._mlp_outputs import w_out_sites
from tl_backward.editing._settings import require_positive
from tl_backward.editing._subject_facts import SubjectFact, read_subjects, subject_facts
from tl_backward.editing._value_search import SearchSettings, search_values
from tl_backward.editing.contexts import checked_templates, memit_contexts
from tl_backward.editing.editor_report import report_of
from tl_backward.editing.key_statistics import KeyStatistics, require_statistics
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.sites import Model, WeightSite, require_eval_mode

TOLERANCE = 0.05
"""Relative tolerance for half precision; a factor or a norm changes far more."""

KernelRows: TypeAlias = Callable[
    [WeightSite, Float[Tensor, "fact d_in"]], Float[Tensor, "fact d_in"]
]
"""The kernel of a site for some keys: the rows of ``U^T``."""


def memit(
    model: Model,
    prompts: Sequence[str],
    targets: Target,
    *,
    subjects: Sequence[str],
    layers: int | Iterable[int],
    statistics: KeyStatistics,
    weight: int | float = 20_000,
    contexts: Sequence[Sequence[str]] | None = None,
    steps: int = 20,
    lr: int | float = 0.5,
    decay: int | float = 0.5,
    kl: int | float = 0.0625,
    clamp: int | float = 0.75,
    prepend_bos: bool | None = None,
) -> WeightEdit:
    """Make targets follow prompts with MEMIT's updates of W_out in several layers.

    For each fact, a search finds the output ``z`` of the last of the layers that makes the target
    probable. Then, layer by layer and with the earlier layers edited, W_out changes by
    ``(weight C + K K^T)^-1 K R``. ``K`` holds the facts' keys, and ``R`` the remaining distance to
    ``z``, divided by the number of remaining layers. The defaults are those of the published code
    for GPT-2 XL (layers 13 to 17 there).

    Args:
        model: A TransformerLens model in eval mode. It is left unchanged: see :class:`WeightEdit`.
        prompts: Texts that contain their subjects, or ``{}`` in their places.
        targets: One target for all prompts or a list with one per prompt: text (mind the leading
            space) or token ids.
        subjects: One per prompt. If the prompt contains it several times, the last one counts.
        layers: The layers of W_out; negative ones count from the last.
        statistics: ``C``, from :func:`key_statistics`, with ``ridge=0`` as in the published code.
        weight: Weight of the sample of ``C``, in tokens; a larger one makes smaller changes.
        contexts: Kinds of templates with ``{}`` for the prompt. A key is the mean over kinds of the
            mean within each kind; the search weights all templates equally and takes the initial
            ``z`` from the first. Default: the plain prompt, and the prompt after five short texts
            that the model generates, always the same ones. For many edits of one model, generate
            them once with :func:`memit_contexts`.
        steps: As for :func:`rome`.
        lr: The same.
        decay: The same.
        kl: The same.
        clamp: The same.
        prepend_bos: The same.

    Returns:
        The edit, not applied, with an :class:`EditorReport` in ``edit.report``.

    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: As for :func:`rome`, and if a norm
            or a factor changes W_out's output before it is added to the residual stream, where
            ``z`` is.

    Warns:
        UserWarning: As for :func:`rome`.

    Example:
        >>> statistics = key_statistics(model, texts, [3, 4, 5], ridge=0)
        >>> edit = memit(model, ["Lionel Messi plays for", "Rome is the capital of"],
        ...              [" Paris", " France"], subjects=["Lionel Messi", "Rome"],
        ...              layers=[3, 4, 5], statistics=statistics)
    """
    require_positive(weight=weight)
    sites = w_out_sites(model, layers)
    require_statistics(statistics, model, sites)

    def rows(site: WeightSite, keys: Tensor) -> Tensor:
        return kernel(keys, partial(statistics.solve, site.name), ridge=weight)

    settings = SearchSettings(steps, lr, decay, kl, clamp)
    return spread(model, prompts, targets, subjects, sites, rows, contexts, settings, prepend_bos)


def spread(
    model: Model,
    prompts: Sequence[str],
    targets: Target,
    subjects: Sequence[str],
    sites: Sequence[WeightSite],
    rows: KernelRows,
    contexts: Sequence[Sequence[str]] | None,
    settings: SearchSettings,
    prepend_bos: bool | None,
) -> WeightEdit:
    """Search the facts' values in the last site's block, and write them layer by layer."""
    require_eval_mode(model)
    kinds = _checked_kinds(memit_contexts(model, prepend_bos) if contexts is None else contexts)
    templates = list(chain.from_iterable(kinds))
    facts = subject_facts(model, prompts, targets, subjects, templates, prepend_bos)
    layer = sites[-1].layer or 0
    point = f"blocks.{layer}.hook_resid_post"
    _require_direct_write(model, sites[-1], point, facts[0])
    values = search_values(model, facts, point, layer, settings)
    in_contexts = [text for fact in facts for text in fact.in_contexts]
    edit, all_keys = WeightEdit(model, {}), {}
    for i, site in enumerate(sites):
        (each,) = read_subjects(model, [site.hook_points[0]], in_contexts, edit)
        by_context = rearrange(each, "(fact context) d_in -> context fact d_in", fact=len(facts))
        means = [kind.mean(0) for kind in by_context.split([len(kind) for kind in kinds])]
        keys = all_keys[site.name] = torch.stack(means).mean(0)
        (now,) = read_subjects(model, [point], [fact.plain for fact in facts], edit)
        missing = (values.initial + values.change - now) / (len(sites) - i)
        edit = edit + WeightEdit(model, {site.name: update(rows(site, keys), missing)})
    edit.report = report_of(sites, facts, values, all_keys)
    return edit


def _require_direct_write(model: Model, site: WeightSite, point: str, fact: SubjectFact) -> None:
    """Raise unless a change of W_out's output equals the change of the block's output."""
    x, before = read_subjects(model, [site.hook_points[0], point], [fact.plain])
    trial = WeightEdit(model, {site.name: update(kernel(x), before)})
    (after,) = read_subjects(model, [point], [fact.plain], trial)
    if (after - 2 * before).norm() > TOLERANCE * before.norm():
        raise NotImplementedError(
            f"{site.name}: a norm or a factor changes its output before it is added to the "
            "residual stream, so it cannot be chosen to reach a given output of the block; use "
            "rome, which searches the value at W_out itself"
        )


def _checked_kinds(contexts: Sequence[Sequence[str]]) -> list[list[str]]:
    if isinstance(contexts, str) or any(isinstance(kind, str) for kind in contexts):
        raise TypeError(
            'contexts must be a list of kinds, each a list of templates, such as [["{}"], '
            f'["The cat. {{}}"]], got {contexts!r}'
        )
    if not contexts:
        raise ValueError('contexts is empty; pass [["{}"]] for the plain prompt alone')
    return [checked_templates(kind) for kind in contexts]
