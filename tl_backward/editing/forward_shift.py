"""The forward pass shift: an edit from one forward pass and no backward pass (section 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import torch

from tl_backward.capture.tokens import Prompt, Target
from tl_backward.editing._shift_search import Candidate, ShiftSearch
from tl_backward.editing._shift_terms import ShiftRule, unit_shift
from tl_backward.editing.key_statistics import KeyStatistics
from tl_backward.editing.runs import WholeRun, weight_inputs
from tl_backward.editing.target_terms import TargetTerms
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.sites import Model, WeightSite, require_eval_mode, weight_sites


@dataclass(frozen=True)
class ShiftReport:
    """What :func:`forward_pass_shift` did.

    Attributes:
        layers: The layers that are edited.
        lr: The step, given or found; where the terms have steps of their own, the largest.
        skipped: For each prompt, whether nothing was done because its target was predicted.
        n_passes: Forward passes from the bottom of the model, to its top or to the edited layer.
        n_upper_passes: Forward passes of the layers from the edit upwards, with several steps in
            one batch each.
        lrs: The steps of the terms, where the search gave them steps of their own.
        gap: With ``"auto"``, how far the logit of the worst target is above all others with the
            edit, in nats (of a skipped one, with the margin added, which it need not have).
        changes: With ``layer="auto"``, for each layer in which an edit succeeds, its step and how
            much it changes elsewhere, the mean ``KL(before || after)`` in nats.
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
        best: The edit that comes nearest.
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
    """Shift what W_out writes for a prompt towards the embedding of a target (section 6).

    The update is ``lr * outer(x, D^T[t])``: ``x`` is the input of W_out at a position of the
    prompt, ``D^T[t]`` the target's column of ``W_U`` as it stands in the model. The projection of
    W_out's output for that input on ``D^T[t]`` rises by ``lr |x|^2 |D^T[t]|^2``. Behind W_out's own
    output nothing is taken into account: a post-norm (Gemma 2 and 3, OLMo 2, GLM-4 ...) acts on the
    shifted output, so steps there have another scale.

    Several prompts, or several layers, give one term each, all from the same forward pass.

    With ``skip_if_predicted`` one whole forward pass is made, else one that stops as soon as
    ``x`` is known, after ``l + 1`` of ``L`` layers.

    Args:
        model: A TransformerLens model in eval mode. It is left as it is: see :class:`WeightEdit`.
        prompt: Text or token ids, of one prompt or of several.
        target: What to shift towards: text (mind the leading space) or token ids, one for all
            prompts or one for each in a list.
        layer: The layer of W_out, or several; negative ones count from the last. ``"auto"`` tries
            all of them and takes, of those in which the edit makes the targets the most probable
            tokens, the one that changes least elsewhere: where the mean ``KL(before || after)`` of
            the next-token distributions at all positions of ``texts`` or, without them, at the
            prompts' positions that do not predict a target, is smallest.
        lr: The step, positive to shift towards the target. ``"auto"`` is the smallest, to about
            1 %, that makes every target the most probable token with all terms in place, with the
            logit ``margin`` above the next; skipped ones have to stay on top. It is one step for
            all terms, but of several tokens of a single prompt's target each gets its own if that
            makes the update smaller (``edit.report.lrs``). It is searched by runs of the layers
            from the edit upwards, several steps in one batch; where such a run does not agree with
            a whole one, by whole ones.
        position: Where ``x`` is taken: an index into the prompt, or one for each prompt.
        tokens: Of a target of several tokens, take the ``"first"``, as the paper does, or
            ``"all"``: one term each, at the position that predicts it when the target is appended
            (teacher forcing).
        iterations: How many updates to make at most, each from a pass with those before in place.
            With ``skip_if_predicted``, prompts whose target is predicted get no more.
        skip_if_predicted: Whether to do nothing for a prompt whose target (all of its tokens, with
            ``tokens="all"``) is predicted; ``edit.report.skipped`` says which.
        key: The input-side vector: ``"input"`` is ``x``; ``"whitened"`` is
            ``|x|^2 C^-1 x / (x^T C^-1 x)``, by which the output for ``x`` itself changes as much
            (``lr`` keeps its meaning), and for other inputs less.
        statistics: For the whitened key, from :func:`key_statistics`.
        value: What is written: ``"target"`` is the paper's ``D^T[t]``; ``"centred"`` is that less
            the mean of all columns of ``W_U``, a direction that the embeddings share and that makes
            no target more probable than others.
        joint: Whether the keys of all terms are solved for together, so that W_out's output for
            each prompt changes by its own ``lr |x|^2`` times its value alone, and for a skipped
            prompt not at all; else the terms add up. With ``lr="auto"`` every term then has a step
            of its own (``edit.report.lrs``).
        ridge: With ``joint``, what is added to the diagonal of the matrix of the keys' products, in
            units of its mean. It keeps keys that are nearly alike from giving large updates, at the
            price of some mixing.
        margin: For ``"auto"``, in nats.
        texts: For ``layer="auto"``, as prompts. Longer ones than the model's context are cut.
        prepend_bos: As in ``model.to_tokens``; the paper uses False. Default: the model's setting.

    Returns:
        The edit, not applied, with a :class:`ShiftReport` in ``edit.report``. It is empty when
        everything was skipped.

    Raises:
        StepNotFoundError: When an ``"auto"`` search does not succeed; a ValueError that says what
            came nearest, with that edit as its attribute ``best``.
        TypeError: When model, prompt or target is malformed.
        ValueError: For a layer or position that does not exist, a step that is not finite,
            arguments that do not go together, and training mode where it changes something.
        NotImplementedError: When W_out has no site (mixtures of experts), or the unembedding does
            not read what W_out writes.

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
        raise ValueError("layer: with joint=True the layer is not searched; pass it")
    if texts is not None and layer != "auto":
        raise ValueError('texts are for layer="auto"; leave them out')
    sites = weight_sites(model, "W_out", None if layer == "auto" else layer)
    require_eval_mode(model)
    if statistics is not None:
        statistics.require_for(model, sites)
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
    sites: Sequence[WeightSite],
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
        f"lr, layer: no edit that was tried lifts the target {search.margin} nats above all other "
        f"tokens; the best, lr={best.step.size:.4g} in layer {_layers(best.sites)}, leaves it "
        f"{best.step.gap:.4g} above (the attribute `best` of this error has it). Try "
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
            "position: with tokens='all' the inputs are taken where the target is predicted; leave "
            "position out"
        )
    if not isinstance(iterations, int) or iterations < 1:
        raise ValueError(f"iterations must be a whole number of at least 1, got {iterations!r}")
    if key not in ("input", "whitened"):
        raise ValueError(f"key must be 'input' or 'whitened', got {key!r}")
    if (key == "whitened") != (statistics is not None):
        raise ValueError(
            "statistics: pass them with key='whitened', and only with it; they are made by "
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
        raise ValueError("ridge is for joint=True; leave it out")
    return ShiftRule(value, statistics, joint, ridge)


def _layers(sites: Sequence[WeightSite]) -> tuple[int, ...]:
    """The layers of some sites within the blocks."""
    return tuple(site.layer for site in sites if site.layer is not None)
