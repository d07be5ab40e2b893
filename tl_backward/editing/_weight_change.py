"""In-place weight changes: all or none of several, restored bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tl_backward._content import content_version, note_restored
from tl_backward._fingerprint import fingerprint
from tl_backward.sites import WeightSite

_changes_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Tokens of the changes in place on each part of a parameter, oldest first."""


class WeightChange:
    """A change that :meth:`make` adds to a weight and :meth:`undo` removes.

    It keeps the original values of the changed slices along the first axis, and a fingerprint of
    the whole changed weight.

    Args:
        site: The site of the weight.
        update: The change to add, in the shape of the weight.

    Raises:
        NotImplementedError: If the weight cannot be changed in place.
        ValueError: If the update, or the updated weight, is not finite.
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
        self._index = site.index
        self._token = object()
        self._fingerprint = ""
        self._versions: tuple[int, int] | None = None

    @torch.no_grad()
    def make(self, stored: Tensor) -> None:
        """Change the weight; half precision is added in float32 and rounded once."""
        before = content_version(stored)
        _changes_of.setdefault(stored, {}).setdefault(repr(self._index), []).append(self._token)
        _write(stored[self._index], self._slices, self._changed)
        self._versions = before, content_version(stored)
        self._fingerprint = fingerprint(stored[self._index])

    @torch.no_grad()
    def undo(self, stored: Tensor) -> None:
        """Restore the original values. Harmless if called twice or before :meth:`make`."""
        present = content_version(stored)
        _write(stored[self._index], self._slices, self._original.to(stored.device))
        if self._versions is not None and present in self._versions:
            note_restored(stored, self._versions[0])
        tokens = _tokens(stored, self._index)
        if self._token in tokens:
            tokens.remove(self._token)

    def require_undoable(self, stored: Tensor) -> None:
        """Raise unless the weight is as this change left it.

        Raises:
            RuntimeError: If it is not.
        """
        tokens = _tokens(stored, self._index)
        if self._token in tokens[:-1]:
            raise RuntimeError(
                f"another edit of {self.name} was applied after this one; revert that one first. "
                "Nothing was reverted"
            )
        if self._token not in tokens or fingerprint(stored[self._index]) != self._fingerprint:
            raise RuntimeError(
                f"{self.name} is not as this edit left it: something else changed or replaced it; "
                "undo that first, or load the model again. Nothing was reverted"
            )


class WeightChanges:
    """Changes of several weights, made together and undone together.

    Args:
        updates: The change of each weight, in its own layout. No weight is changed yet.

    Attributes:
        are_made: Whether all changes are in place. An interrupt can leave only some of them;
            undoing again is always safe.
        are_disputed: Whether a weight was found to differ from what these changes left.

    Raises:
        NotImplementedError, ValueError: As :class:`WeightChange`.
    """

    def __init__(self, updates: Iterable[tuple[WeightSite, Float[Tensor, "..."]]]) -> None:
        self.are_made = self.are_disputed = False
        self._changes = [
            (site, site.stored_in[0], WeightChange(site, update)) for site, update in updates
        ]

    def make(self) -> None:
        """Make all changes."""
        for _, stored, change in self._changes:
            change.make(stored)
        self.are_made = True

    def undo(self) -> None:
        """Undo all changes, including those that are already undone."""
        self.are_made = False
        for _, stored, change in reversed(self._changes):
            change.undo(stored)

    def require_undoable(self) -> None:
        """Raise unless every weight is as these changes, or an interrupt, left it.

        Raises:
            RuntimeError: If one is not; the changes are then disputed.
        """
        if not self.are_made:
            return
        try:
            for site, stored, change in self._changes:
                change.require_undoable(stored)
                if site.stored_in[0] is not stored:
                    raise RuntimeError(
                        f"the model's tensor for {site.name} was replaced after this edit was "
                        "applied; load the model again. Nothing was reverted"
                    )
        except RuntimeError:
            self.are_disputed = True
            raise
        self.are_disputed = False


def _write(parameter: Tensor, slices: Int[Tensor, "_"], values: Float[Tensor, "..."]) -> None:
    """Write values, and clear the stale weights in autocast's cache."""
    parameter[slices] = values
    torch.clear_autocast_cache()


def standing_changes(sites: Iterable[WeightSite]) -> frozenset[object]:
    """The tokens of all changes that are in place on some weights."""
    return frozenset(token for site in sites for token in _tokens(*site.stored_in))


def _tokens(stored: Tensor, index: Any) -> list[object]:
    """The tokens of the changes in place on a part of a parameter."""
    return _changes_of.get(stored, {}).get(repr(index), [])


def _require_changeable(site: WeightSite, parameter: Tensor) -> None:
    how = site.recomputed
    if how is not None:
        raise NotImplementedError(
            f"{site.name} is recomputed in every forward pass by {how.by}, so a change would not "
            f"last; {how.remedy}, or use fwd_hooks(), which change no weight"
        )
    if site.feeds:
        raise NotImplementedError(
            f"{', '.join(site.feeds)} is recomputed from the parameter of {site.name} in every "
            "forward pass, so a change would affect both; use fwd_hooks(), which affect "
            f"{site.name} only, or give it its own parameter"
        )
    if type(parameter.data) is not Tensor or not parameter.is_floating_point():
        raise NotImplementedError(
            f"{site.name} is stored quantised ({type(parameter.data).__name__}, "
            f"{parameter.dtype}), so it cannot be changed in place; use fwd_hooks(), which change "
            "no weight"
        )
    if parameter.device.type == "meta":
        raise NotImplementedError(
            f"{site.name} is offloaded to a checkpoint that is read anew in each forward pass, so "
            "nothing can be added to it; use fwd_hooks(), which touch no weight, or have "
            "accelerate's cpu_offload() or disk_offload() keep it"
        )
