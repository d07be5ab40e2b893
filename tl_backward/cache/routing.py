"""The routing of tokens in a mixture of experts, and the factors of each expert's matrices."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_backward.cache.rows import of_example
from tl_backward.factors import GradientFactors
from tl_backward.sites.stacked_experts import RememberedExperts


@dataclass(frozen=True, eq=False)
class Routing:
    """Inputs, routes and VJPs of one layer's experts.

    Attributes:
        inputs: The input that all experts of a token share.
        vjps: ``dL/dy`` at the sum of the outputs of a token's experts. The VJP at an expert's
            ``W_out`` is this vector times the expert's weight (in Llama 4, where the weight
            multiplies the input, this vector itself).
        experts: Experts of each token.
        weights: Their routing weights.
        scales_input: Whether the weights multiply an expert's input, not its output.
        lengths: Rows per example if the examples of a batch differ in length; otherwise None.
    """

    inputs: Float[Tensor, "*batch n d_in"]
    vjps: Float[Tensor, "*batch n d_out"]
    experts: Int[Tensor, "*batch n k"]
    weights: Float[Tensor, "*batch n k"]
    scales_input: bool = False
    lengths: tuple[int, ...] | None = None

    def example(self, b: int) -> Routing:
        """The routing of one prompt of a batch."""

        def select(tensor: Tensor) -> Tensor:
            return of_example(tensor, b, self.lengths)

        return Routing(
            select(self.inputs),
            select(self.vjps),
            select(self.experts),
            select(self.weights),
            self.scales_input,
        )

    def weights_of(self, expert: int) -> Float[Tensor, "*batch n"]:
        """One expert's routing weight for each token; 0 for tokens not routed to it."""
        return (self.weights * self.is_at(expert)).sum(-1)

    def is_at(self, expert: int) -> Bool[Tensor, "*batch n k"]:
        """True where ``experts`` is the given expert."""
        return self.experts == expert

    def n_rows(self, expert: int) -> tuple[int, ...] | None:
        """Number of tokens routed to an expert, for each prompt of a batch."""
        is_routed = self.is_at(expert).any(-1)
        if self.lengths is not None:
            return tuple(int(each.sum()) for each in is_routed.split(self.lengths))
        return tuple(is_routed.sum(-1).tolist()) if is_routed.ndim > 1 else None

    def rows(self, expert: int, tensor: Float[Tensor, "*batch n d"]) -> Float[Tensor, "routed d"]:
        """The rows of the tokens routed to an expert."""
        return tensor[self.is_at(expert).any(-1)]


class RoutedExperts:
    """The experts of one layer in a cache, whose factors are computed on access.

    Args:
        routing: Inputs, routes and VJPs of the experts.
        experts: Computes the factors.
    """

    def __init__(self, routing: Routing, experts: RememberedExperts) -> None:
        self._routing, self._experts = routing, experts
        self._made: dict[int, dict[str, GradientFactors]] = {}
        self._examples: dict[int, RoutedExperts] = {}

    def factors(self, expert: int, kind: str) -> GradientFactors:
        """The factors of one matrix of an expert, without rows if no token is routed to it.

        Raises:
            RuntimeError: If the model is gone, or its weights changed after the run.
        """
        if expert not in self._made:
            routing = self._routing
            weights = routing.rows(expert, rearrange(routing.weights_of(expert), "... -> ... 1"))
            found = self._experts.factors(
                expert,
                routing.rows(expert, routing.inputs),
                rearrange(weights, "row 1 -> row"),
                routing.rows(expert, routing.vjps),
            )
            lengths = routing.n_rows(expert)
            self._made[expert] = {
                kind: GradientFactors(x, vjps, lengths) for kind, (x, vjps) in found.items()
            }
        return self._made[expert][kind]

    def example(self, b: int) -> RoutedExperts:
        """The experts for one prompt of a batch."""
        if b not in self._examples:
            self._examples[b] = RoutedExperts(self._routing.example(b), self._experts)
        return self._examples[b]


@dataclass(frozen=True, eq=False)
class ExpertFactors:
    """The factors of one matrix of one expert, computed on access.

    Attributes:
        of_layer: Experts of the layer.
        expert: Index of the expert.
        kind: Kind of the matrix.
        shape: ``(d_in, d_out)``.
    """

    of_layer: RoutedExperts = field(repr=False)
    expert: int
    kind: str
    shape: tuple[int, int]

    def made(self) -> GradientFactors:
        """Compute the factors.

        Raises:
            RuntimeError: If the model is gone, or its weights changed after the run.
        """
        return self.of_layer.factors(self.expert, self.kind)

    def example(self, b: int) -> ExpertFactors:
        """The factors for one prompt of a batch."""
        return replace(self, of_layer=self.of_layer.example(b))
