"""Where a tensor is read in the forward pass."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn


class Tap(NamedTuple):
    """A module and the side of it at which a tensor passes.

    At a HookPoint the tensor passes outside of the hooks on it. At any other module it passes
    inside of them, where the module itself takes its input and gives its output.

    Attributes:
        module: The module.
        side: On which side of it.
        item: Which of its arguments it is, or of several outputs, counted from 0.
    """

    module: nn.Module
    side: Literal["input", "output"]
    item: int = 0

    @property
    def is_outside_of_hooks(self) -> bool:
        """Whether it is at a HookPoint."""
        from transformer_lens.hook_points import HookPoint

        return isinstance(self.module, HookPoint)
