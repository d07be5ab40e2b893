"""Ready-made editing methods for :func:`tl_backward.evaluation.evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

from tl_backward.capture import run_with_backward_cache
from tl_backward.capture.bos import prepends_bos
from tl_backward.editing import WeightEdit, fine_tune, forward_pass_shift, gradient_step
from tl_backward.evaluation.records import Record
from tl_backward.evaluation.scoring import tokenised
from tl_backward.sites import Model

Method: TypeAlias = Callable[..., WeightEdit | None]
"""Makes the edit for a model and a record, or returns None for no edit. If it has an argument
``prepend_bos``, it is told whether the evaluation's texts begin with a BOS token."""


def unedited(model: Model, record: Record) -> None:
    """The method that edits nothing."""


def shift(
    *, layer: int | Sequence[int] | Literal["auto"], lr: float | Literal["auto"], **options: Any
) -> Method:
    """The forward pass shift towards the new target's first token.

    Args:
        layer: As in :func:`forward_pass_shift`.
        lr: The same.
        options: Its other arguments, such as ``tokens="all"`` or ``skip_if_predicted=False``.

    Example:
        >>> evaluate(model, records, shift(layer=22, lr=0.3))
    """

    def method(model: Model, record: Record, prepend_bos: bool | None = None) -> WeightEdit:
        bos = prepends_bos(model, prepend_bos)
        prompt, target = _fact(model, record, bos)
        arguments = {"layer": layer, "lr": lr, "prepend_bos": bos, **options}
        return forward_pass_shift(model, prompt, target, **arguments)

    return method


def fine_tuning(*, lr: float, layers: int | Iterable[int] | None = None, **options: Any) -> Method:
    """Gradient descent on W_out, or on other weights, until the new target is predicted.

    Args:
        lr: As in :func:`fine_tune`.
        layers: The same.
        options: Its other arguments, such as ``weights="W_in"`` or ``max_steps=10``.
    """

    def method(model: Model, record: Record, prepend_bos: bool | None = None) -> WeightEdit:
        prompt, target = _fact(model, record, prepend_bos)
        return fine_tune(model, prompt, target, lr=lr, layers=layers, **options)

    return method


def gradient(
    *,
    lr: float,
    weights: str | Iterable[str] = "W_out",
    layers: int | Iterable[int] | None = None,
) -> Method:
    """One step of gradient descent on the new target's negative log-likelihood.

    Args:
        lr: As in :func:`gradient_step`.
        weights: Kinds of weights to change.
        layers: Layers to change. Default: all.
    """
    kinds = weights if isinstance(weights, str) else list(weights)

    def method(model: Model, record: Record, prepend_bos: bool | None = None) -> WeightEdit:
        prompt, target = _fact(model, record, prepend_bos)
        _, cache = run_with_backward_cache(model, prompt, target, weights=kinds, layers=layers)
        return gradient_step(cache, lr=lr, model=model)

    return method


def _fact(model: Model, record: Record, prepend_bos: bool | None) -> tuple[list[int], list[int]]:
    """The tokens of the prompt and of its new target, as the evaluation scores them."""
    case = tokenised(model, record.prompt, [record.target_new], prepend_bos=prepend_bos)
    return case.prefix, case.targets[0]
