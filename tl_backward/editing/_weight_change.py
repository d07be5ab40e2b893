"""Weights that are changed in place, all or none of them, and put back bit for bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tl_backward._fingerprint import fingerprint
from tl_backward.sites import WeightSite

_changes_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By weight, the tokens of the changes that it bears, oldest first."""


class WeightChange:
    """What :meth:`make` adds to a weight, and :meth:`undo` takes away again.

    It keeps the original values of the slices along the first axis that it changes, and a
    fingerprint of the whole weight as it left it.

    Args:
        site: Where the weight is used.
        update: What to add to it, of the same shape.

    Raises:
        NotImplementedError: When nothing can be added to the weight in place.
        ValueError: When the update, or the weight with it, is not finite.
    """

    def __init__(self, site: WeightSite, update: Float[Tensor, "..."]) -> None:
        self.name = site.name
        parameter = site.parameter
        _require_changeable(site, parameter)
        update = update.to(parameter.device)
        if not update.isfinite().all():
            raise ValueError(f"the update of {self.name} is not finite; check its factors")
        self._slices: Int[Tensor, "_"] = update.flatten(1).any(1).nonzero().squeeze(1)
        self._original = parameter.detach()[self._slices]
        self._changed = (self._original + update[self._slices]).to(parameter.dtype)
        if (self._original.isfinite() & ~self._changed.isfinite()).any():
            raise ValueError(
                f"{self.name} with its update is too large for {parameter.dtype}; use a smaller "
                "edit, or fwd_hooks()"
            )
        self._token = object()
        self._fingerprint = ""

    @torch.no_grad()
    def make(self, parameter: Tensor) -> None:
        """Change the weight; half precision is added in float32 and rounded once."""
        _changes_of.setdefault(parameter, []).append(self._token)
        _write(parameter, self._slices, self._changed)
        self._fingerprint = fingerprint(parameter)

    @torch.no_grad()
    def undo(self, parameter: Tensor) -> None:
        """Put the original values back. Doing it twice, or before :meth:`make`, does no harm."""
        _write(parameter, self._slices, self._original.to(parameter.device))
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


class WeightChanges:
    """The changes of several weights, which are made together and undone together.

    Args:
        updates: What to add to each weight, in its own layout. No weight is changed yet.

    Attributes:
        are_made: Whether the weights bear all of them. An interrupt can leave some behind; undoing
            them once more is always safe then.
        are_disputed: Whether the weights were found to be other than these changes left them.

    Raises:
        NotImplementedError, ValueError: As :class:`WeightChange`.
    """

    def __init__(self, updates: Iterable[tuple[WeightSite, Float[Tensor, "..."]]]) -> None:
        self.are_made = self.are_disputed = False
        self._changes = [
            (site, site.parameter, WeightChange(site, update)) for site, update in updates
        ]

    def make(self) -> None:
        """Change all of the weights."""
        for _, parameter, change in self._changes:
            change.make(parameter)
        self.are_made = True

    def undo(self) -> None:
        """Put all of them back, those too that are back already."""
        self.are_made = False
        for _, parameter, change in reversed(self._changes):
            change.undo(parameter)

    def require_undoable(self) -> None:
        """Make sure that every weight is as these changes left it, or that an interrupt left it.

        Raises:
            RuntimeError: When one is not; the changes are then disputed.
        """
        if not self.are_made:
            return
        try:
            for site, parameter, change in self._changes:
                change.require_undoable(parameter)
                if site.parameter is not parameter:
                    raise RuntimeError(
                        f"the model has another tensor for {site.name} than when this edit was "
                        "applied; load it again. Nothing was reverted"
                    )
        except RuntimeError:
            self.are_disputed = True
            raise
        self.are_disputed = False


def _write(parameter: Tensor, slices: Int[Tensor, "_"], values: Float[Tensor, "..."]) -> None:
    """Write values. Autocast would go on with the weights that it has cast before."""
    parameter[slices] = values
    torch.clear_autocast_cache()


def standing_changes(parameters: Iterable[Tensor]) -> frozenset[object]:
    """What tells the changes that some weights bear now from all others."""
    return frozenset(token for p in parameters for token in _changes_of.get(p, []))


def _require_changeable(site: WeightSite, parameter: Tensor) -> None:
    how = site.recomputed
    if how is not None:
        raise NotImplementedError(
            f"{site.name} is recomputed in every forward pass by {how.by}, so what is added to it "
            f"would not last; {how.remedy}, or use fwd_hooks(), which touch no weight"
        )
    if site.feeds:
        raise NotImplementedError(
            f"{', '.join(site.feeds)} is recomputed from the parameter of {site.name} in every "
            "forward pass, so what is added to it would change both; use fwd_hooks(), which change "
            f"{site.name} alone, or give it a parameter of its own"
        )
    if type(parameter.data) is not Tensor or not parameter.is_floating_point():
        raise NotImplementedError(
            f"{site.name} is stored quantised ({type(parameter.data).__name__}, "
            f"{parameter.dtype}), so nothing can be added to it in place; use fwd_hooks(), which "
            "touch no weight"
        )
    if parameter.device.type == "meta":
        raise NotImplementedError(
            f"{site.name} is offloaded: there is no weight to add to between forward passes; use "
            "fwd_hooks(), which touch no weight"
        )
