"""Where a weight matrix sits between two points of the forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from jaxtyping import Float
from torch import Tensor, nn

Model: TypeAlias = Any
"""A TransformerLens model, of any of the classes that this package has a file for."""


class Tap(NamedTuple):
    """A module and the side of it at which a tensor passes."""

    module: nn.Module
    side: Literal["input", "output"]


@dataclass(frozen=True, eq=False)
class WeightSite:
    """One weight matrix ``W`` of a model, used as ``y = x W``, and where ``x`` and ``y`` are.

    Attributes:
        name: ``"blocks.5.mlp.W_out"``, unique in the model.
        kind: ``"W_out"``.
        layer: ``5``, or ``None`` outside the blocks.
        hook_in: Name of the HookPoint that ``x`` passes.
        hook_out: Name of the HookPoint that ``y`` passes.
        d_in: Width of ``x``.
        d_out: Width of ``y``.
        x_tap: Gives the place where ``x`` is read, after the hooks of ``hook_in``.
        y_tap: Gives the place where ``y`` is read, before the hooks of ``hook_out``.
    """

    name: str
    kind: str
    layer: int | None
    hook_in: str
    hook_out: str
    d_in: int
    d_out: int
    x_tap: Callable[[], Tap] = field(repr=False)
    y_tap: Callable[[], Tap] = field(repr=False)
    read_parameter: Callable[[], Tensor] = field(repr=False)
    layout: Callable[[Tensor], Tensor] = field(repr=False)

    @property
    def parameter(self) -> Tensor:
        """The live tensor that the forward pass multiplies by, in its own layout."""
        return self.read_parameter()

    def to_parameter_layout(self, matrix: Float[Tensor, "d_in d_out"]) -> Tensor:
        """A matrix in the orientation ``[d_in, d_out]`` as a tensor shaped like ``parameter``.

        Raises:
            ValueError: When the matrix is not ``[d_in, d_out]``.
        """
        if tuple(matrix.shape) != (self.d_in, self.d_out):
            raise ValueError(
                f"{self.name} takes a [{self.d_in}, {self.d_out}] matrix, got {tuple(matrix.shape)}"
            )
        return self.layout(matrix)


def select_sites(
    sites: Sequence[WeightSite],
    n_layers: int,
    weights: str | Iterable[str] | None,
    layers: int | Iterable[int] | None,
) -> list[WeightSite]:
    """The sites of the given kinds and layers, in the order of the model."""
    available = list(dict.fromkeys(site.kind for site in sites))
    kinds = available if weights is None else _as_list(weights, str)
    unknown = [kind for kind in kinds if kind not in available]
    if unknown or not kinds:
        raise ValueError(f"weights={weights!r}: this model has {', '.join(available)}")
    if layers is None:
        wanted: set[int | None] = {site.layer for site in sites}
    else:
        indices = _as_list(layers, int)
        outside = [
            i
            for i in indices
            if isinstance(i, bool) or not isinstance(i, int) or not -n_layers <= i < n_layers
        ]
        if outside or not indices:
            raise ValueError(
                f"layers={layers!r}: this model has layers 0 to {n_layers - 1} "
                f"(or -{n_layers} to -1, counted from the last)"
            )
        wanted = {i % n_layers for i in indices}
    selected = [site for site in sites if site.kind in kinds and site.layer in wanted]
    if not selected:
        raise ValueError(f"layers={layers!r} have none of the weights {', '.join(kinds)}")
    return selected


def _as_list(value: Any, single: type) -> list[Any]:
    return [value] if isinstance(value, single) else list(value)
