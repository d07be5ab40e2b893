"""What one forward and one backward pass leave behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from tl_backward.factors import GradientFactors


@dataclass(frozen=True, eq=False)
class BackwardCache(Mapping[str, GradientFactors]):
    """The gradient factors of every captured weight matrix, by site name.

    ``cache["blocks.5.mlp.W_out"]`` and ``cache["W_out", 5]`` are the same
    :class:`~tl_backward.GradientFactors`. It keeps no reference to the model and no autograd graph.

    Attributes:
        factors: The factors by site name, in the order of the model.
        tokens: The tokens of the prompt.
        str_tokens: The same as strings.
        positions: The positions that the rows of the factors belong to.
        target_ids: The target of the loss.
        loss: The loss that was differentiated, in nats.
    """

    factors: dict[str, GradientFactors]
    tokens: Int[Tensor, "pos"]
    str_tokens: list[str]
    positions: Int[Tensor, "n"]
    target_ids: Int[Tensor, ""]
    loss: Float[Tensor, ""]

    def __getitem__(self, key: str | tuple[str, int | None]) -> GradientFactors:
        name = key if isinstance(key, str) else self._name(*key)
        try:
            return self.factors[name]
        except KeyError:
            raise KeyError(
                f"{key!r} was not captured; there is {', '.join(self.factors)}"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.factors)

    def __len__(self) -> int:
        return len(self.factors)

    def __repr__(self) -> str:
        return (
            f"BackwardCache({len(self)} weights, {len(self.positions)} of {len(self.tokens)} "
            f"positions, loss={self.loss.item():.4f})"
        )

    def _name(self, kind: str, layer: int | None = None) -> str:
        """The site name behind ``(kind, layer)``."""
        of_kind = [name for name in self.factors if name.rpartition(".")[2] == kind]
        prefix = "" if layer is None else f"blocks.{layer}."
        return next((name for name in of_kind if name.startswith(prefix)), f"{prefix}{kind}")
