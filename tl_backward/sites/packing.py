"""Linear layers whose weight is stored packed: quantised to 4 or 8 bits, with scales beside it."""

from __future__ import annotations

from torch import Tensor, nn


def how_packed(module: nn.Module) -> str | None:
    """How a linear layer stores its weight, if not as the matrix; None for all other modules.

    Such a layer says itself how wide it is, and has a way of its own to multiply (bitsandbytes,
    FP8, GPTQ, AWQ ...).
    """
    widths = vars(module).get("out_features"), vars(module).get("in_features")
    if not all(isinstance(width, int) for width in widths):
        return None
    if type(module).forward is nn.Linear.forward:
        return None
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return kind
    if tuple(weight.shape) == widths and weight.is_floating_point() and weight.itemsize > 1:
        return None
    return f"{kind}, {str(weight.dtype).removeprefix('torch.')} {list(weight.shape)}"
