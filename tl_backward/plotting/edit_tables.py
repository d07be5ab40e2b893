"""What figures and pages show of an edit, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

OUTSIDE = ("embed", "pos_embed", "unembed")


@dataclass(frozen=True)
class Reading:
    """One singular direction, read.

    Attributes:
        singular_value: Its norm.
        share: Its share of the energy at its weight.
        feature: What on the other side of the weight is positive for the tokens at the top.
        top: The tokens at the top, the outermost first.
        bottom: Those at the bottom, which go with the feature's other sign.
    """

    singular_value: float
    share: float
    feature: str
    top: list[str]
    bottom: list[str]


@dataclass(frozen=True)
class EditCell:
    """What an edit adds to one weight.

    Attributes:
        header: Its layer, or where else it is.
        weight: Its kind.
        norm: Frobenius norm of what is added.
        readings: Its leading directions, the largest first.
    """

    header: str
    weight: str
    norm: float
    readings: list[Reading]


@dataclass(frozen=True)
class EditTable:
    """An edit, weight by weight.

    Attributes:
        cells: The weights that it changes.
    """

    cells: list[EditCell]

    @property
    def weights(self) -> list[str]:
        """The kinds, in the order of the edit."""
        return list(dict.fromkeys(cell.weight for cell in self.cells))

    @cached_property
    def headers(self) -> list[str]:
        """The unembedding, the layers from the last to the first, and the embeddings."""
        there = {cell.header for cell in self.cells}
        layers = sorted(there.difference(OUTSIDE), key=int)
        return [
            header
            for header in reversed(["embed", "pos_embed", *layers, "unembed"])
            if header in there
        ]

    def cell(self, header: str, weight: str) -> EditCell | None:
        """What is added at one place, if something is."""
        return self._by_place.get((header, weight))

    @cached_property
    def _by_place(self) -> dict[tuple[str, str], EditCell]:
        return {(cell.header, cell.weight): cell for cell in self.cells}

    def level(self, cell: EditCell) -> float:
        """The norm on a cube-root scale on which the largest is 1."""
        return float((cell.norm / max(one.norm for one in self.cells)) ** (1 / 3))
