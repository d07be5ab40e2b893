"""Whether a tensor still holds what it held before."""

from __future__ import annotations

import weakref

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

N_SAMPLES = 128

_same_as: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By tensor, versions that hold what an earlier version held."""


def content_version(tensor: Tensor) -> int:
    """The first of the tensor's versions with its present values, as far as that is known."""
    return _same_as.get(tensor, {}).get(tensor._version, tensor._version)


def note_restored(tensor: Tensor, version: int) -> None:
    """Note that the tensor holds again what it held in an earlier version."""
    _same_as.setdefault(tensor, {})[tensor._version] = version


class Content:
    """What a tensor holds now. The tensor is not kept alive.

    PyTorch counts changes in place, except those of ``tensor.data``: some of the values are kept to
    notice these.

    Args:
        tensor: The tensor.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = weakref.ref(tensor)
        self._version = content_version(tensor)
        self._samples = _samples(tensor).clone()

    def is_that_of(self, tensor: Tensor) -> bool:
        """Whether a tensor is the same one, and holds the same values as far as can be seen."""
        return (
            self._tensor() is tensor
            and content_version(tensor) == self._version
            and bool(_samples(tensor).to(self._samples.device).equal(self._samples))
        )


def _samples(tensor: Tensor) -> Tensor:
    """Values from all over the tensor."""
    flat = tensor.detach().flatten()
    return flat[:: max(1, len(flat) // N_SAMPLES)]
