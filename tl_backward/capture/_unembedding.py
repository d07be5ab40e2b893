"""Unembedding only the positions whose logits the loss reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import repeat
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tl_backward.capture.batch import Batch
from tl_backward.capture.objectives import Loss
from tl_backward.capture.run_hooks import Run
from tl_backward.sites import Model, Tap, WeightSite, end_of_stream

W_U = "unembed.W_U"
REGISTRIES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class LastPositions:
    """Restricts the unembedding to the last ``n`` positions of each text.

    Attributes:
        spans: Slice of each text's positions within its ``n`` places.
        tokens: Tokens at these positions.
        were_taken: Whether the model unembedded only these positions.
    """

    def __init__(self, run: Run, model: Model, batch: Batch, n: int) -> None:
        self._run, self._unembed, self._shape = run, model.unembed, (len(batch), batch.width)
        first, end = (
            torch.tensor([getattr(s, at) for s in batch.spans]) for at in ("start", "stop")
        )
        places = end[:, None] + torch.arange(-n, 0)
        self._positions: Int[Tensor, "batch n"] = torch.maximum(places, first[:, None])
        self.spans = [slice(max(0, n - len(text)), n) for text in batch.texts]
        self.tokens: Int[Tensor, "batch n"] = batch.tokens.gather(1, self._positions)
        self.were_taken = False

    def watched(self, sites: Sequence[WeightSite]) -> list[WeightSite]:
        """The sites, with the ``x`` of ``W_U`` read at all positions."""
        outside = Tap(self._unembed, "input")
        return [replace(s, x_tap=lambda: outside) if s.name == W_U else s for s in sites]

    def narrow(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Pre-hook of the unembedding: select the residual stream at these positions."""
        x, *others = args
        is_of_run = self._run.is_forward() and not self._run.depth
        if not is_of_run or x.shape[:-1] != self._shape:
            return None
        self.were_taken = True
        return x.gather(1, self._index(x)), *others

    def widen(self, vjps: dict[Hashable, list[Tensor]]) -> None:
        """Expand the VJPs at the logits to all positions, with zeros where no logit is read."""
        for key in [(W_U, "y")] if (W_U, "y") in vjps else []:
            vjps[key] = [
                vjp.new_zeros(*self._shape, vjp.shape[-1]).scatter_add_(1, self._index(vjp), vjp)
                for vjp in vjps[key]
            ]

    def _index(self, like: Tensor) -> Int[Tensor, "batch n d"]:
        return repeat(self._positions.to(like.device), "batch n -> batch n d", d=like.shape[-1])


def last_positions(
    run: Run,
    model: Model,
    modules: Iterable[nn.Module],
    batch: Batch,
    sites: Sequence[WeightSite],
    loss: Loss,
) -> LastPositions | None:
    """The positions that a loss needs; None if all must be unembedded.

    All are needed if the loss reads all logits, if hooks are at, in or around the unembedding, if
    adapters in it are captured, or if the residual stream ends there.
    """
    n = getattr(loss, "n_last", None)
    if n is None or n >= batch.width or end_of_stream(model) is not None:
        return None
    if _is_seen_by_others(model, modules):
        return None
    if any(site.name.startswith("unembed.") and site.name != W_U for site in sites):
        return None
    return LastPositions(run, model, batch, n)


def _is_seen_by_others(model: Model, modules: Iterable[nn.Module]) -> bool:
    """Whether there are hooks in or around the unembedding."""
    if any(getattr(torch_module, f"_global{name}") for name in REGISTRIES):
        return True
    around: list[nn.Module] = [model.unembed]
    parents = defaultdict(list)
    for module in modules:
        for child in module._modules.values():
            parents[child].append(module)
    for module in around:  # grows
        around += parents[module]
    return any(
        getattr(module, name)
        for module in [*around, *model.unembed.modules()]
        for name in REGISTRIES
    )
