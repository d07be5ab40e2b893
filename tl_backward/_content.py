"""Detecting changes of a tensor's values."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

N_SAMPLES = 128

_same_as: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""For each tensor, versions whose values equal those of an earlier version."""


def content_version(tensor: Tensor) -> int:
    """The first known version of the tensor with its current values."""
    return _same_as.get(tensor, {}).get(tensor._version, tensor._version)


def note_restored(tensor: Tensor, version: int) -> None:
    """Record that the tensor has the values of an earlier version again."""
    _same_as.setdefault(tensor, {})[tensor._version] = version


class Content:
    """The current values of a tensor, without keeping the tensor alive.

    PyTorch counts in-place changes, except those through ``tensor.data``; sampled values detect
    these.

    Args:
        tensor: The tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = content_version(tensor)
        self._samples = _samples(tensor).clone()

    def is_that_of(self, tensor: Tensor) -> bool:
        """Whether this is the same tensor, with no detected change of its values."""
        return (
            self._tensor() is tensor
            and content_version(tensor) == self._version
            and bool(_samples(tensor).to(self._samples.device).equal(self._samples))
        )


def _samples(tensor: Tensor) -> Tensor:
    """Values sampled evenly from the tensor."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // N_SAMPLES)]
