"""Repeated differentiable runs of the same texts from a layer upwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward.capture.batch import Batch
from tl_backward.editing.runs import LEAST_TOLERANCE, Places, logits_at, returning
from tl_backward.sites import Model


class UpperLayers:
    """Texts with cached outputs of the layers below the first hooked one.

    Attributes:
        logits: Logits of the unmodified model at the places.

    Args:
        model: A TransformerLens model.
        batch: Texts, padded on the right.
        places: Texts and positions whose logits are needed.
        first: The lowest block that hooks will change.
    """

    @torch.no_grad()
    def __init__(self, model: Model, batch: Batch, places: Places, first: int) -> None:
        self._model, self._batch, self._places = model, batch, places
        self._below: list[Any] = []
        with ExitStack() as stack:
            for block in model.blocks[:first]:
                handle = block.register_forward_hook(lambda block, x, y: self._below.append(y))
                stack.callback(handle.remove)
            self.logits: Float[Tensor, "place d_vocab"] = logits_at(model, batch, places)[0]
        if not self._is_reproduced(first):
            self._below = []

    def run(
        self, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]]
    ) -> Float[Tensor, "place d_vocab"]:
        """The differentiable logits at the places with some hooks."""
        with ExitStack() as stack:
            below = zip(self._model.blocks, self._below, strict=False)
            for block, output in below:
                stack.enter_context(returning(block, output))
            return logits_at(self._model, self._batch, self._places, fwd_hooks)[0]

    def _is_reproduced(self, first: int) -> bool:
        """Whether the cached outputs of the lower blocks reproduce the whole run."""
        if len(self._below) != first:  # some blocks run several times
            return False
        tolerance = max(torch.finfo(self.logits.dtype).eps ** 0.5, LEAST_TOLERANCE)
        return bool((self.run([]) - self.logits).norm() <= tolerance * self.logits.norm())
