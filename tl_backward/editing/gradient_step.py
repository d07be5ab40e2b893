"""Fine-tuning in factored form: plain gradient descent on some weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from tl_backward._undo import Undo
from tl_backward.cache import BackwardCache
from tl_backward.capture import run_with_backward_cache
from tl_backward.capture.tokens import Prompt, Target
from tl_backward.editing.target_terms import TargetTerms
from tl_backward.editing.weight_edit import WeightEdit
from tl_backward.sites import Model, occupy
from tl_backward.sites.names import parse_site_name


@dataclass(frozen=True)
class FineTuneReport:
    """Report of :func:`fine_tune`.

    Attributes:
        n_steps: Number of steps taken.
        predicted: Whether each prompt's target is predicted with the edit.
        losses: Loss of each prompt before the first step and after every step, in nats.
    """

    n_steps: int
    predicted: tuple[bool, ...]
    losses: tuple[tuple[float, ...], ...]


def gradient_step(
    cache: BackwardCache,
    *,
    lr: float,
    weights: str | Iterable[str] | None = None,
    layers: int | Iterable[int] | None = None,
    model: Model | None = None,
) -> WeightEdit:
    """One step of gradient descent, ``-lr * dL/dW``, on some of the weights of a cache.

    A positive ``lr`` lowers the loss. With ``weights="W_in"`` (and ``"W_gate"``) the step is only
    the imprint, with ``"W_out"`` only the shift. For several prompts it is the step on the sum of
    their losses. If the gradient has a single row ``x_i``, the output of W for ``x_i`` changes by
    ``-lr |x_i|^2 delta_i`` (Eq 17), to which neuron ``j`` of the input contributes
    ``-lr x_i[j]^2 delta_i`` (Eq 18).

    Args:
        cache: From :func:`run_with_backward_cache`.
        lr: The learning rate.
        weights: Kinds of weights to change. Default: all captured kinds; tied embeddings then add
            up to the step of their shared weight.
        layers: Layers to change; negative ones count from the last. Default: all captured layers.
        model: The model to bind the edit to. A cache has no model; without one, use ``edit.bind``.

    Raises:
        ValueError: If ``lr`` is not finite, a weight or layer was not captured, or the model is not
            the cache's.

    Example:
        >>> loss, cache = run_with_backward_cache(model, "Lionel Messi plays for", " Paris")
        >>> with gradient_step(cache, lr=0.1, weights="W_out", layers=20, model=model).applied():
        ...     model("Lionel Messi plays for")
    """
    if not isinstance(lr, Real) or isinstance(lr, bool) or not math.isfinite(lr):
        raise ValueError(f"lr must be a finite number, got {lr!r}")
    kinds = _required("weights", weights, {_kind(name) for name in cache})
    n_layers = cache.residual.n_layers
    wanted = [layers] if isinstance(layers, int) else layers
    if wanted is not None:
        wanted = [layer + n_layers if layer < 0 else layer for layer in wanted]
    chosen = _required("layers", wanted, {_layer(name) for name in cache})
    factors = {
        name: cache[name] for name in cache if _kind(name) in kinds and _layer(name) in chosen
    }
    if not factors:
        raise ValueError(f"layers={layers!r}: none of weights={weights!r} was captured there")
    return -lr * WeightEdit(model, factors)


def fine_tune(
    model: Model,
    prompt: Prompt,
    target: Target,
    *,
    lr: float,
    weights: str | Iterable[str] | None = "W_out",
    layers: int | Iterable[int] | None = None,
    max_steps: int = 25,
    prepend_bos: bool | None = None,
) -> WeightEdit:
    """Gradient descent on some weights until the target is predicted: the fine-tuning baseline.

    The loss is the target's negative log-likelihood, averaged over its tokens (teacher-forced) and
    summed over prompts. Each step uses the gradient with the earlier steps in place, by hooks; the
    weights themselves are not changed (experts' are, and restored bit for bit).

    Args:
        model: A TransformerLens model in eval mode.
        prompt: Text or token ids of one prompt or several.
        target: The target to fine-tune towards, one for all prompts or a list with one per prompt.
        lr: The learning rate.
        weights: Kinds of weights to change; ``"W_in"`` is only the imprint, ``"W_out"`` only the
            shift.
        layers: Layers to change; negative ones count from the last. Default: all.
        max_steps: Maximum number of steps.
        prepend_bos: As in ``model.to_tokens``. Default: the model's setting.

    Returns:
        The sum of all steps, not applied, with a :class:`FineTuneReport` in ``edit.report``. It is
        empty if the target is predicted from the start.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`run_with_backward_cache`; and for an
            ``lr`` that is not finite, or ``max_steps`` below 1.

    Example:
        >>> edit = fine_tune(model, "Lionel Messi plays for", " Paris", layers=20, lr=0.3)
        >>> edit.report.n_steps, edit.report.predicted
    """
    if not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps must be a whole number of at least 1, got {max_steps!r}")
    kinds = weights if weights is None or isinstance(weights, str) else list(weights)
    terms = TargetTerms(model, prompt, target, -1, "all", prepend_bos)
    seen: list[Tensor] = []
    losses: list[Tensor] = []
    edit = WeightEdit(model, {})
    n_steps = 0
    with Undo() as undo, undo, undo:
        occupy(model, undo)
        while True:
            see: tuple[str, Any] = ("unembed.hook_out", lambda logits, hook: seen.append(logits))
            with edit.in_effect() as hooks:
                loss, cache = run_with_backward_cache(
                    model,
                    terms.prompt,
                    terms.batch.whole(terms.batch.targets),
                    weights=kinds,
                    layers=layers,
                    padding_side="right",
                    fwd_hooks=[*hooks, see],
                )
                losses.append(loss.reshape(-1))
                predicted = terms.gaps(seen.pop().detach()[terms.places][None])[0] > 0
                if predicted.all() or n_steps == max_steps:
                    break
                step = gradient_step(cache, lr=lr, model=model)
            edit = edit + step
            n_steps += 1
    edit.report = FineTuneReport(
        n_steps,
        tuple(predicted.tolist()),
        tuple(zip(*(one.tolist() for one in losses), strict=True)),
    )
    return edit


def _required(argument: str, wanted: Any, captured: set[Any]) -> set[Any]:
    """The requested kinds or layers, all of which must have been captured."""
    if wanted is None:
        return captured
    chosen = {wanted} if isinstance(wanted, str | int) else set(wanted)
    if not chosen or not chosen <= captured:
        there = ", ".join(str(one) for one in sorted(captured - {None}))
        raise ValueError(f"{argument}={wanted!r}: the cache has {there}")
    return chosen


def _kind(name: str) -> str:
    return parse_site_name(name).kind


def _layer(name: str) -> int | None:
    return int(name.split(".")[1]) if name.startswith("blocks.") else None
