"""The forward pass shift: an edit from one forward pass and no backward pass (section 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch

from tl_backward.capture.tokens import Prompt, Target
from tl_backward.editing._expert_outputs import dense_matrices, output_matrices
from tl_backward.editing._shift_search import Candidate, ShiftSearch
from tl_backward.editing._shift_terms import ShiftRule, unit_shift
from tl_backward.editing.key_statistics import KeyStatistics, require_statistics
from tl_backward.editing.runs import Matrix, WholeRun, weight_inputs
from tl_backward.editing.target_terms import TargetTerms
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.sites import Model, require_eval_mode, weight_sites


@dataclass(frozen=True)
class ShiftReport:
    """Report of :func:`forward_pass_shift`.

    Attributes:
        layers: Edited layers.
        lr: The given or found step; the largest one if terms have their own steps.
        skipped: Whether each prompt was skipped because its target was already predicted.
        n_passes: Number of forward passes from the bottom of the model, to its top or to the edited
            layer.
        n_upper_passes: Number of forward passes of the layers from the edit upwards, each with
            several steps in one batch.
        lrs: The steps of the terms, if the search gave them their own steps.
        gap: With ``"auto"``, the distance of the worst target's logit above all others with the
            edit, in nats (for a skipped target, plus the margin that it does not need).
        changes: With ``layer="auto"``, for each layer in which an edit succeeds, its step and its
            change of other predictions, the mean ``KL(before || after)`` in nats.
    """

    layers: tuple[int, ...]
    lr: float
    skipped: tuple[bool, ...]
    n_passes: int
    n_upper_passes: int = 0
    lrs: tuple[float, ...] = ()
    gap: float | None = None
    changes: dict[int, tuple[float, float]] = field(default_factory=dict)


class StepNotFoundError(ValueError):
    """An ``"auto"`` search found no edit that makes the targets the most probable tokens.

    Attributes:
        best: The edit that comes closest.
    """

    def __init__(self, message: str, best: WeightEdit) -> None:
        super().__init__(message)
        self.best = best


def forward_pass_shift(
    model: Model,
    prompt: Prompt,
    target: Target,
    *,
    layer: int | Sequence[int] | Literal["auto"],
    lr: float | Literal["auto"],
    position: int | Sequence[int] = -1,
    tokens: Literal["first", "all"] = "first",
    iterations: int = 1,
    skip_if_predicted: bool = True,
    key: Literal["input", "whitened"] = "input",
    statistics: KeyStatistics | None = None,
    value: Literal["target", "centred"] = "target",
    joint: bool = False,
    ridge: int | float = 0.0,
    margin: float = 0.1,
    texts: Prompt | None = None,
    prepend_bos: bool | None = None,
) -> WeightEdit:
    """Shift W_out's output for a prompt towards the embedding of a target (section 6).

    The update is ``lr * outer(x, D^T[t])``, where ``x`` is the input of W_out at a position of the
    prompt and ``D^T[t]`` the target's column of ``W_U`` as it is in the model. The projection of
    W_out's output for that input onto ``D^T[t]`` rises by ``lr |x|^2 |D^T[t]|^2``. The shift
    ignores everything after W_out's own output: a post-norm (Gemma 2 and 3, OLMo 2, GLM-4 ...) acts
    on the shifted output, so steps have another scale there.

    In a mixture of experts, each expert of the token gets a term with its own input times its
    routing weight, ``lr * outer(w x, D^T[t])``, so that together they act like one matrix with all
    of these inputs. Shared experts are unchanged.

    Several prompts, or several layers, give one term each, all from the same forward pass.

    With ``skip_if_predicted``, the forward pass runs through the whole model; otherwise it stops as
    soon as ``x`` is known, after ``l + 1`` of ``L`` layers.

    Args:
        model: A TransformerLens model in eval mode. It is left unchanged: see :class:`WeightEdit`.
        prompt: Text or token ids of one prompt or several.
        target: The target to shift towards: text (mind the leading space) or token ids, one for all
            prompts or a list with one per prompt.
        layer: The layer of W_out, or several; negative ones count from the last. ``"auto"`` tries
            all layers. Among those whose edit makes the targets the most probable tokens, it
            chooses the one with the smallest change of other predictions: the mean
            ``KL(before || after)`` of the next-token distributions at all positions of ``texts``
            or, without them, at the prompts' positions that predict no target.
        lr: The step, positive to shift towards the target. ``"auto"`` finds the smallest step, to
            about 1 %, that makes every target the most probable token with all terms in place, with
            its logit ``margin`` above the next; skipped targets must stay on top. All terms share
            the step, except that the tokens of a single prompt's target get their own steps if that
            makes the update smaller (``edit.report.lrs``). The search runs the layers from the edit
            upwards, several steps in one batch, or the whole model if such a run does not agree
            with a whole one.
        position: Position of ``x``: an index into the prompt, or one per prompt.
        tokens: For a target of several tokens, use the ``"first"``, as the paper does, or
            ``"all"``: one term each, at the position that predicts it when the target is appended
            (teacher forcing).
        iterations: Maximum number of updates, each from a pass with the earlier ones in place. With
            ``skip_if_predicted``, prompts whose target is predicted get no further updates.
        skip_if_predicted: Whether to skip a prompt whose target (all of its tokens, with
            ``tokens="all"``) is already predicted; see ``edit.report.skipped``.
        key: The input-side vector: ``"input"`` is ``x``; ``"whitened"`` is
            ``|x|^2 C^-1 x / (x^T C^-1 x)``, which changes the output for ``x`` itself by the same
            amount (``lr`` keeps its meaning), and for other inputs by less.
        statistics: For the whitened key, from :func:`key_statistics`.
        value: The value to write: ``"target"`` is the paper's ``D^T[t]``; ``"centred"`` subtracts
            the mean of all columns of ``W_U``, a direction that the embeddings share and that makes
            no target more probable than others.
        joint: Whether to solve for the keys of all terms together, so that W_out's output for each
            prompt changes only by its own ``lr |x|^2`` times its value, and for a skipped prompt
            not at all; otherwise the terms add up. With ``lr="auto"``, every term then has its own
            step (``edit.report.lrs``).
        ridge: With ``joint``, added to the diagonal of the Gram matrix of the keys, in units of its
            mean. It prevents large updates from nearly equal keys, at the price of some mixing.
        margin: Required distance of the targets' logits above all others for ``"auto"``, in nats.
        texts: For ``layer="auto"``, given as prompts; truncated to the model's context.
        prepend_bos: As in ``model.to_tokens``; the paper uses False. Default: the model's setting.

    Returns:
        The edit, not applied, with a :class:`ShiftReport` in ``edit.report``. It is empty if all
        prompts were skipped.

    Raises:
        StepNotFoundError: If an ``"auto"`` search does not succeed; a ValueError with the closest
            edit in its attribute ``best``.
        TypeError: If model, prompt or target is malformed.
        ValueError: For a layer or position that does not exist, a step that is not finite,
            arguments that exclude each other, or training mode that changes the result.
        NotImplementedError: If W_out has no site, if the layer has experts and ``key`` is
            ``"whitened"`` or the model is a ``HookedTransformer``, or if the unembedding does not
            read W_out's output space.

    Example:
        >>> edit = forward_pass_shift(model, "Lionel Messi plays for", " Paris", layer=20, lr=0.24)
        >>> with edit.applied():
        ...     print(model.generate("Lionel Messi plays for", use_past_kv_cache=False))
    """
    _require_valid(lr, position, tokens, iterations, key, statistics, margin)
    rule = _rule(value, statistics, joint, ridge)
    automatic = "auto" in (layer, lr)
    if automatic and iterations != 1:
        raise ValueError('iterations: a search ("auto") makes one update; leave iterations out')
    if joint and layer == "auto":
        raise ValueError('layer="auto" does not work with joint=True; pass a layer')
    if texts is not None and layer != "auto":
        raise ValueError('texts are only for layer="auto"; leave them out')
    sites = output_matrices(weight_sites(model, "W_out", None if layer == "auto" else layer))
    require_eval_mode(model)
    if statistics is not None:
        require_statistics(statistics, model, dense_matrices(sites))
    terms = TargetTerms(model, prompt, target, position, tokens, prepend_bos)
    if not automatic:
        return _with_fixed_step(model, terms, sites, float(lr), iterations, skip_if_predicted, rule)
    search = ShiftSearch(model, terms, sites, rule, margin, skip_if_predicted)
    if search.skipped.all():
        edit = WeightEdit(model, {})
        edit.report = ShiftReport((), 0.0, tuple(search.skipped.tolist()), search.n_passes)
        return edit
    if layer == "auto":
        candidates = search.layers(lr, texts, prepend_bos)
    else:
        candidates = [search.candidate(sites, lr)]
    return _best(search, candidates)


def _with_fixed_step(
    model: Model,
    terms: TargetTerms,
    sites: Sequence[Matrix],
    lr: float,
    iterations: int,
    skip_if_predicted: bool,
    rule: ShiftRule,
) -> WeightEdit:
    edit, skipped, n_passes = WeightEdit(model, {}), (False,) * len(terms.batch), 0
    for _ in range(iterations):
        if skip_if_predicted:
            run = WholeRun(model, terms.batch, sites, edit)
            inputs, wanted = run.inputs, terms.gaps(run.logits[terms.places][None])[0] <= 0
        else:
            inputs = weight_inputs(model, sites, terms.batch, edit)
            wanted = torch.ones(len(terms.batch), dtype=torch.bool)
        skipped = skipped if n_passes else tuple((~wanted).tolist())
        n_passes += 1
        if not wanted.any():
            break
        edit = edit + lr * unit_shift(model, sites, terms, inputs, wanted, rule)
    edit.report = ShiftReport(_layers(sites), lr, skipped, n_passes)
    return edit


def _best(search: ShiftSearch, candidates: Sequence[Candidate]) -> WeightEdit:
    """The first of the candidates, if it succeeds."""
    best = candidates[0]
    edit = best.step.size * best.unit
    edit.report = ShiftReport(
        layers=_layers(best.sites),
        lr=best.step.size,
        skipped=tuple(search.skipped.tolist()),
        n_passes=search.n_passes,
        n_upper_passes=search.n_upper_passes,
        lrs=best.of_each,
        gap=best.step.gap,
        changes={
            layer: (one.step.size, one.change)
            for one in candidates
            if search.succeeds(one) and not math.isnan(one.change)
            for layer in _layers(one.sites)
        },
    )
    if search.succeeds(best):
        return edit
    raise StepNotFoundError(
        f"lr, layer: no edit lifts the target {search.margin} nats above all other tokens; the "
        f"best, lr={best.step.size:.4g} in layer {_layers(best.sites)}, leaves it "
        f"{best.step.gap:.4g} above (see the attribute `best` of this error). Try "
        'layer="auto", a smaller margin, or a fixed lr',
        edit,
    )


def _require_valid(
    lr: Any,
    position: Any,
    tokens: Any,
    iterations: Any,
    key: Any,
    statistics: Any,
    margin: Any,
) -> None:
    if lr != "auto" and not (
        isinstance(lr, Real) and not isinstance(lr, bool) and math.isfinite(lr)
    ):
        raise ValueError(f'lr must be a finite number or "auto", got {lr!r}')
    if tokens not in ("first", "all"):
        raise ValueError(f"tokens must be 'first' or 'all', got {tokens!r}")
    if tokens == "all" and position != -1:
        raise ValueError(
            "position: tokens='all' uses the positions that predict the target; leave position out"
        )
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a whole number of at least 1, got {iterations!r}")
    if key not in ("input", "whitened"):
        raise ValueError(f"key must be 'input' or 'whitened', got {key!r}")
    if (key == "whitened") != (statistics is not None):
        raise ValueError(
            "statistics: key='whitened' needs them, and only key='whitened'; make them with "
            "key_statistics(model, texts, layer)"
        )
    if not math.isfinite(margin) or margin < 0:
        raise ValueError(f"margin must be a finite number of at least 0, got {margin!r}")


def _rule(value: Any, statistics: KeyStatistics | None, joint: Any, ridge: Any) -> ShiftRule:
    if value not in ("target", "centred"):
        raise ValueError(f"value must be 'target' or 'centred', got {value!r}")
    if not 0 <= ridge < math.inf:
        raise ValueError(f"ridge must be a finite number of at least 0, got {ridge!r}")
    if ridge and not joint:
        raise ValueError("ridge is only for joint=True; leave it out")
    return ShiftRule(value, statistics, joint, ridge)


def _layers(sites: Sequence[Matrix]) -> tuple[int, ...]:
    """The layers of the sites inside blocks."""
    return tuple(site.layer for site in sites if site.layer is not None)
