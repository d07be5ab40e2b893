"""The rows of a padded batch that belong to its texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from einops import rearrange
from jaxtyping import Int, Shaped
from torch import Tensor

from tl_backward._integers import is_integer

Positions: TypeAlias = int | slice | tuple[int, ...] | Sequence[int] | Tensor | None


@dataclass(frozen=True, eq=False)
class Rows:
    """Selects rows from tensors that hold ``width`` positions per text.

    Attributes:
        single: Whether there is one text and no batch axis.
        width: Number of positions of the padded batch.
        starts: Start of each text in the padded batch.
        kept: Positions of each text to keep, relative to its start.
    """

    single: bool
    width: int
    starts: list[int]
    kept: list[Int[Tensor, "_"]]

    @cached_property
    def _are_all(self) -> bool:
        """Whether every text fills its row and keeps all positions in order."""
        every = torch.arange(self.width)
        return all(torch.equal(kept, every) for kept in self.kept)

    def lengths(self, uses: int = 1) -> tuple[int, ...] | None:
        """Number of rows per text if the texts differ, for ``uses`` tensors; otherwise None."""
        lengths = tuple(uses * len(kept) for kept in self.kept)
        return lengths if len(set(lengths)) > 1 else None

    def of(self, tensors: Sequence[Tensor]) -> Shaped[Tensor, "*batch n d"]:
        """The rows of one or more tensors, by text; in one axis if texts differ in length."""
        n_texts, uses = len(self.starts), len(tensors)
        rows = [by_text(tensor, n_texts) for tensor in tensors]
        whole = rows[0] if uses == 1 else torch.cat(rows, dim=1)
        if not self._are_all:
            flat = torch.cat(
                [
                    (b * uses + use) * self.width + start + kept
                    for b, (start, kept) in enumerate(zip(self.starts, self.kept, strict=True))
                    for use in range(uses)
                ]
            )
            whole = rearrange(whole, "batch pos d -> (batch pos) d")[flat.to(whole.device)]
            if self.lengths() is None:
                whole = rearrange(whole, "(batch n) d -> batch n d", batch=n_texts)
        return whole[0] if self.single else whole


def by_text(tensor: Shaped[Tensor, "..."], n_texts: int) -> Shaped[Tensor, "batch pos d"]:
    """One vector per text and position, merging head axes and splitting a merged batch axis."""
    if tensor.ndim == 2:
        return rearrange(tensor, "(batch pos) d -> batch pos d", batch=n_texts)
    return rearrange(tensor, "batch pos ... -> batch pos (...)")


def of_example(
    tensor: Shaped[Tensor, "*lead d"], b: int, lengths: tuple[int, ...] | None
) -> Shaped[Tensor, "*one d"]:
    """One text's rows of a result of :meth:`Rows.of`, or of a stack of results."""
    if lengths is None:
        return tensor.select(-3, b)
    return tensor.split(lengths, dim=-2)[b]


def kept_positions(positions: Positions, n: int, example: int | None) -> Int[Tensor, "n"]:
    """The indices selected from ``n`` tokens by an index, slice or list of positions."""
    text = "this prompt" if example is None else f"prompt {example}"
    return selected(positions, n, "positions", f"{text} has positions")


def selected(index: Positions, n: int, argument: str, has: str) -> Int[Tensor, "n"]:
    """The indices selected from ``n`` items by an argument of TransformerLens's ``Slice``.

    Raises:
        ValueError: If the index is out of range or selects nothing; ``has`` names the valid items.
    """
    if index is None:
        return torch.arange(n)
    plain = plain_index(index)
    try:
        kept = torch.arange(n)[[plain] if isinstance(plain, int) else plain]
    except (IndexError, TypeError) as error:
        raise ValueError(f"{argument}={index!r}: {has} 0 to {n - 1}") from error
    if not len(kept):
        raise ValueError(f"{argument}={index!r} selects none: {has} 0 to {n - 1}")
    return kept


def plain_index(index: Any) -> Any:
    """Convert to an index for tensors: unwrap ``Slice``, turn tuples into slices."""
    index = getattr(index, "slice", index)
    if isinstance(index, tuple):
        return slice(*index)
    if isinstance(index, Tensor) and not index.ndim:
        index = index.item()
    return int(index) if is_integer(index) else index
