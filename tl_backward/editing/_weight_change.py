"""One weight, changed in place and put back bit for bit."""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_changes_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By weight, the tokens of the changes that it bears, oldest first."""


class WeightChange:
    """What :meth:`make` adds to a weight, and :meth:`undo` takes away again.

    It keeps the original values of the slices along the first axis that it changes, and a
    fingerprint of the whole weight as it left it.

    Args:
        name: What errors call the weight.
        parameter: The tensor to change.
        update: What to add to it, of the same shape.

    Raises:
        NotImplementedError: When the weight is quantised.
        ValueError: When the update is not finite.
    """

    def __init__(self, name: str, parameter: Tensor, update: Float[Tensor, "..."]) -> None:
        if type(parameter.data) is not Tensor or not parameter.is_floating_point():
            raise NotImplementedError(
                f"{name} is stored quantised ({type(parameter.data).__name__}, {parameter.dtype}), "
                "so nothing can be added to it in place; use fwd_hooks(), which touch no weight"
            )
        if not update.isfinite().all():
            raise ValueError(f"the update of {name} is not finite; check its factors")
        self.name = name
        self._slices: Int[Tensor, "_"] = update.flatten(1).any(1).nonzero().squeeze(1)
        self._update = update[self._slices]
        self._original = parameter.detach()[self._slices]
        self._token = object()
        self._fingerprint = ""

    @torch.no_grad()
    def make(self, parameter: Tensor) -> None:
        """Change the weight; half precision is added in float32 and rounded once."""
        _changes_of.setdefault(parameter, []).append(self._token)
        parameter[self._slices] = (self._original + self._update).to(parameter.dtype)
        self._fingerprint = fingerprint(parameter)

    @torch.no_grad()
    def undo(self, parameter: Tensor) -> None:
        """Put the original values back. Does no harm to a weight that was not changed yet."""
        parameter[self._slices] = self._original.to(parameter.device)
        tokens = _changes_of.get(parameter, [])
        if self._token in tokens:
            tokens.remove(self._token)

    def require_undoable(self, parameter: Tensor) -> None:
        """Make sure that the weight is as this change left it.

        Raises:
            RuntimeError: When it is not.
        """
        tokens = _changes_of.get(parameter, [])
        if self._token in tokens[:-1]:
            raise RuntimeError(
                f"another edit of {self.name} was applied after this one; revert that one first. "
                "Nothing was reverted"
            )
        if self._token not in tokens or fingerprint(parameter) != self._fingerprint:
            raise RuntimeError(
                f"{self.name} is not as this edit left it: something else has changed or replaced "
                "it since; undo that first, or load the model again. Nothing was reverted"
            )


def fingerprint(weight: Tensor) -> str:
    """A SHA-256 of the weight's values, dtype and shape."""
    plain = weight.detach()
    if type(plain) is not Tensor:
        plain = plain.dequantize()
    described = hashlib.sha256(f"{plain.dtype}{list(plain.shape)}".encode())
    described.update(plain.cpu().flatten().view(torch.uint8).numpy().data)
    return described.hexdigest()
