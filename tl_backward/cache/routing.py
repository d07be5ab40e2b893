"""Where the tokens of a mixture of experts went, and the factors of each expert's matrices."""

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
    """What went into the experts of one layer, where it went, and what came back.

    Attributes:
        inputs: The input that all experts of a token have in common.
        vjps: ``dL/dy`` at the sum of what a token's experts give. The VJP at the ``W_out`` of each
            of them is this vector times its weight (in Llama 4, where the weight multiplies the
            input, this vector).
        experts: The experts of each token.
        weights: Their routing weights.
        scales_input: Whether these multiply an expert's input, not its output.
        lengths: Number of rows of each example of a batch whose examples differ in it; else None.
    """

    inputs: Float[Tensor, "*batch n d_in"]
    vjps: Float[Tensor, "*batch n d_out"]
    experts: Int[Tensor, "*batch n k"]
    weights: Float[Tensor, "*batch n k"]
    scales_input: bool = False
    lengths: tuple[int, ...] | None = None

    def example(self, b: int) -> Routing:
        """The routing of one prompt of several."""

        def of_one(tensor: Tensor) -> Tensor:
            return of_example(tensor, b, self.lengths)

        return Routing(
            of_one(self.inputs),
            of_one(self.vjps),
            of_one(self.experts),
            of_one(self.weights),
            self.scales_input,
        )

    def weights_of(self, expert: int) -> Float[Tensor, "*batch n"]:
        """The routing weight of one expert for each token; 0 where it is none of its experts."""
        return (self.weights * self.is_at(expert)).sum(-1)

    def is_at(self, expert: int) -> Bool[Tensor, "*batch n k"]:
        """Where an expert is."""
        return self.experts == expert

    def n_rows(self, expert: int) -> tuple[int, ...] | None:
        """How many tokens of each prompt of several are routed to an expert."""
        is_routed = self.is_at(expert).any(-1)
        if self.lengths is not None:
            return tuple(int(of_one.sum()) for of_one in is_routed.split(self.lengths))
        return tuple(is_routed.sum(-1).tolist()) if is_routed.ndim > 1 else None

    def rows(self, expert: int, tensor: Float[Tensor, "*batch n d"]) -> Float[Tensor, "routed d"]:
        """The rows of the tokens that are routed to an expert."""
        return tensor[self.is_at(expert).any(-1)]


class RoutedExperts:
    """The experts of one layer in a cache: their factors are made when they are asked for.

    Args:
        routing: What passed them.
        experts: What makes the factors.
    """

    def __init__(self, routing: Routing, experts: RememberedExperts) -> None:
        self._routing, self._experts = routing, experts
        self._made: dict[int, dict[str, GradientFactors]] = {}
        self._examples: dict[int, RoutedExperts] = {}

    def factors(self, expert: int, kind: str) -> GradientFactors:
        """The factors of one matrix of an expert: no rows where no token is routed to it.

        Raises:
            RuntimeError: When the model is gone, or its weights are no longer those of the run.
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
        """Those of one prompt of several."""
        if b not in self._examples:
            self._examples[b] = RoutedExperts(self._routing.example(b), self._experts)
        return self._examples[b]


@dataclass(frozen=True, eq=False)
class ExpertFactors:
    """The factors of one matrix of one expert, made when they are asked for.

    Attributes:
        of_layer: The experts of the layer.
        expert: Which of them.
        kind: Which of its matrices.
        shape: ``(d_in, d_out)``.
    """

    of_layer: RoutedExperts = field(repr=False)
    expert: int
    kind: str
    shape: tuple[int, int]

    def made(self) -> GradientFactors:
        """The factors.

        Raises:
            RuntimeError: When the model is gone, or its weights are no longer those of the run.
        """
        return self.of_layer.factors(self.expert, self.kind)

    def example(self, b: int) -> ExpertFactors:
        """Those of one prompt of several."""
        return replace(self, of_layer=self.of_layer.example(b))
