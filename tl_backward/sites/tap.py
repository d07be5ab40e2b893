"""Taps: places to read a tensor in the forward pass."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import nn


class Tap(NamedTuple):
    """A module and one of its sides, where a tensor is read.

    At a HookPoint, the tensor is read outside the hooks on it. At any other module, it is read
    inside the hooks, at the module's own input or output.

    Attributes:
        module: The module.
        side: Its side.
        item: Index among its arguments, or among several outputs.
    """

    module: nn.Module
    side: Literal["input", "output"]
    item: int = 0
    keyword: str | None = None
    """The argument by which the tensor comes in, if by name."""

    @property
    def is_outside_of_hooks(self) -> bool:
        """Whether the tap is at a HookPoint."""
        from transformer_lens.hook_points import HookPoint

        return isinstance(self.module, HookPoint)
