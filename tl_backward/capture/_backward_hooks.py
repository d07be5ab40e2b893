"""What the capture does around the backward hooks that are on a model."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool
from torch import Tensor

from tl_backward.capture.run_hooks import Run
from tl_backward.sites import Model

ATTENTION_SCORES = ("hook_attn_scores", "hook_pattern")


class CalledAgain(NotImplementedError):
    """A backward hook would get a part of the VJP that it has had."""


class GuardedHooks:
    """Gives each backward hook a VJP of its own to edit in place, and checks what it returns.

    Autograd hands the very same tensor to all branches of a sum, as of the residual stream. At
    padding the VJP stays 0 whatever a hook returns, so that a text gets what it gets alone.

    Args:
        run: The run, before its forward pass, in which PyTorch collects the hooks.
        model: A model with all of its backward hooks.
        mask: 1 at the tokens of the batch, 0 at padding.

    Attributes:
        are_done: Whether the backward pass is over. Then nothing may pass a hook any more.
    """

    def __init__(self, run: Run, model: Model, mask: Bool[Tensor, "batch pos"]) -> None:
        self.are_done = False
        self._run = run
        self._padding = None if mask.all() else ~mask
        for point in {point for point in model.hook_dict.values() if point.bwd_hooks}:
            run.hook_backward(point, self._before, self._behind)

    def _before(
        self, point: Any, vjps: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        if not self._concern_the_run(vjps):
            return None
        if self.are_done:
            raise CalledAgain(
                "per_head=True passes through attention once for every head, and would call the "
                f"backward hook at {point.name} each time; run without the one or the other"
            )
        return tuple(None if vjp is None else vjp.clone() for vjp in vjps)

    def _behind(
        self, point: Any, patched: tuple[Any, ...], given: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        if not self._concern_the_run(given):
            return None
        for returned, vjp in zip(patched, given, strict=False):
            if returned is not None and vjp is not None:
                _require_alike(point, returned, vjp)
        if self._padding is None:
            return None
        return tuple(
            None if vjp is None else _without_padding(point, vjp, self._padding.to(vjp.device))
            for vjp in patched
        )

    def _concern_the_run(self, vjps: tuple[Tensor | None, ...]) -> bool:
        return any(vjp is not None and self._run.may_own(vjp) for vjp in vjps)


def _require_alike(point: Any, returned: Any, vjp: Tensor) -> None:
    if not isinstance(returned, Tensor):
        got = f"a {type(returned).__name__}"
    elif returned.shape != vjp.shape:
        got = f"the shape {list(returned.shape)}"
    elif returned.dtype != vjp.dtype:
        got = f"a tensor of {returned.dtype}"
    else:
        return
    raise ValueError(
        f"a backward hook at {point.name} returned {got}; it must return a tensor like the VJP "
        f"that it is given, {vjp.dtype} of the shape {list(vjp.shape)}, or None"
    )


def _without_padding(point: Any, vjp: Tensor, padding: Tensor) -> Tensor:
    """The VJP with zeros at padding. A tensor that has no axis of positions stays as it is."""
    n_texts, width = padding.shape
    if len(vjp) == n_texts * width:  # [batch * pos, ...], as in the MLPs of OPT
        return vjp.masked_fill(padding.reshape(-1, *[1] * (vjp.ndim - 1)), 0)
    for axis in _axes_of_positions(point, vjp, width):
        if len(vjp) == n_texts and vjp.ndim > axis and vjp.shape[axis] == width:
            shape = [n_texts, *[1] * (vjp.ndim - 1)]
            shape[axis] = width
            vjp = vjp.masked_fill(padding.reshape(shape), 0)
    return vjp


def _axes_of_positions(point: Any, vjp: Tensor, width: int) -> tuple[int, ...]:
    """Of ``[batch, pos, ...]``, ``[batch, head, pos, d_head]`` or ``[batch, head, query, key]``.

    TransformerLens shows rotated queries and keys by position first, but keeps them by head.
    """
    if point.name.endswith(ATTENTION_SCORES):
        return 2, 3
    by_head = (
        vjp.shape[1] != width
        or getattr(point, "pos_dim", None) == 2
        or getattr(point, "hook_conversion", None) is not None
    )
    return (2,) if vjp.ndim == 4 and by_head else (1,)
