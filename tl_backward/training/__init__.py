"""What a fine-tune wrote, and what training writes while it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tl_backward.training.attribution import attribute
from tl_backward.training.watch import Observation, TrainingWatch

if TYPE_CHECKING:
    from tl_backward.training.trainer_callback import BackwardLensCallback

__all__ = ["BackwardLensCallback", "Observation", "TrainingWatch", "attribute"]


def __getattr__(name: str) -> Any:
    """The callback, whose base class is in transformers, on its first use."""
    if name != "BackwardLensCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tl_backward.training.trainer_callback import BackwardLensCallback

    return BackwardLensCallback
