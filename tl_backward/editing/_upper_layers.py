"""Repeated runs of the same texts from a layer upwards, through which gradients flow."""

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
    """Some texts, whose run through the layers below the first one is kept.

    Attributes:
        logits: What the model gives at the places as it is.

    Args:
        model: A TransformerLens model.
        batch: Texts, padded on the right.
        places: Where logits are needed.
        first: The lowest block in which hooks will change something.
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
        """The logits at the places with some hooks, through which gradients flow."""
        with ExitStack() as stack:
            below = zip(self._model.blocks, self._below, strict=False)
            for block, output in below:
                stack.enter_context(returning(block, output))
            return logits_at(self._model, self._batch, self._places, fwd_hooks)[0]

    def _is_reproduced(self, first: int) -> bool:
        """Whether the outputs of the blocks below are all that the upper ones need."""
        if len(self._below) != first:  # some run several times
            return False
        tolerance = max(torch.finfo(self.logits.dtype).eps ** 0.5, LEAST_TOLERANCE)
        return bool((self.run([]) - self.logits).norm() <= tolerance * self.logits.norm())
