"""Guards around a model's backward hooks during a capture."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool
from torch import Tensor

from tl_backward.capture.run_hooks import Run
from tl_backward.sites import Model

ATTENTION_SCORES = ("hook_attn_scores", "hook_pattern")


class CalledAgain(NotImplementedError):
    """A backward hook would be called a second time, with a part of the VJP."""


class GuardedHooks:
    """Gives each backward hook its own copy of the VJP, and checks the returned value.

    A hook may edit its VJP in place, but autograd passes one tensor to all branches of a sum, such
    as the residual stream. At padding the VJP stays 0 whatever a hook returns, so that each text
    gets the same result as alone.

    Args:
        run: The run, before its forward pass (where PyTorch collects the hooks).
        model: A model with all of its backward hooks.
        mask: True at the tokens of the batch, False at padding.

    Attributes:
        are_done: Whether the backward pass is over; later calls of a hook raise.
    """

    def __init__(self, run: Run, model: Model, mask: Bool[Tensor, "batch pos"]) -> None:
        self.are_done = False
        self._run = run
        self._padding = None if mask.all() else ~mask
        for point in {point for point in model.hook_dict.values() if point.bwd_hooks}:
            run.hook_backward(point, self._before, self._after)

    def _before(
        self, point: Any, vjps: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        if not self._belong_to_run(vjps):
            return None
        if self.are_done:
            raise CalledAgain(
                "per_head=True runs a backward pass through attention for every head, which would "
                f"call the backward hook at {point.name} again; drop per_head or the hook"
            )
        return tuple(None if vjp is None else vjp.clone() for vjp in vjps)

    def _after(
        self, point: Any, patched: tuple[Any, ...], given: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...] | None:
        if not self._belong_to_run(given):
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

    def _belong_to_run(self, vjps: tuple[Tensor | None, ...]) -> bool:
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
        f"a backward hook at {point.name} returned {got}; it must return None or a tensor like its "
        f"VJP, {vjp.dtype} of the shape {list(vjp.shape)}"
    )


def _without_padding(point: Any, vjp: Tensor, padding: Tensor) -> Tensor:
    """The VJP with zeros at padding; a tensor without a position axis is unchanged."""
    n_texts, width = padding.shape
    if len(vjp) == n_texts * width:  # [batch * pos, ...], as in the MLPs of OPT
        return vjp.masked_fill(padding.reshape(-1, *[1] * (vjp.ndim - 1)), 0)
    for axis in _position_axes(point, vjp, width):
        if len(vjp) == n_texts and vjp.ndim > axis and vjp.shape[axis] == width:
            shape = [n_texts, *[1] * (vjp.ndim - 1)]
            shape[axis] = width
            vjp = vjp.masked_fill(padding.reshape(shape), 0)
    return vjp


def _position_axes(point: Any, vjp: Tensor, width: int) -> tuple[int, ...]:
    """In ``[batch, pos, ...]``, ``[batch, head, pos, d_head]`` or ``[batch, head, query, key]``.

    TransformerLens shows rotated queries and keys with positions first, but stores heads first.
    """
    if point.name.endswith(ATTENTION_SCORES):
        return 2, 3
    by_head = (
        vjp.shape[1] != width
        or getattr(point, "pos_dim", None) == 2
        or getattr(point, "hook_conversion", None) is not None
    )
    return (2,) if vjp.ndim == 4 and by_head else (1,)
