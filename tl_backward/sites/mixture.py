"""The experts of one layer, and the places where tokens enter and leave them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from tl_backward.sites.stacked_experts import StackedExperts
from tl_backward.sites.tap import Tap


class Routes(NamedTuple):
    """The experts that each token is routed to, and their weights.

    Attributes:
        experts: Experts of each token.
        weights: Factor of each expert's output (in Llama 4, of its input).
    """

    experts: Int[Tensor, "token k"]
    weights: Float[Tensor, "token k"]


@dataclass(frozen=True, eq=False)
class Mixture:
    """The experts of one layer; the sites of all their matrices refer to it.

    Attributes:
        name: Its name, e.g. ``"blocks.5.mlp.experts"``.
        n_experts: Number of experts.
        taps: Taps to record in the forward pass, by name; ``"input"`` is the input that all experts
            of a token share.
        output: Reads the sum of the experts' outputs.
        routes: Computes the routes from the recorded tensors.
        stacked: The experts' weights and computation, if they are in one module. The factors of
            each expert are then recomputed from input and output; otherwise each matrix is read at
            its own module.
        rows: For a matrix with its own module, selects the rows of an expert at this module, and
            the tokens of these rows.
        residual_tap: Reads the output after a post-norm; None without a post-norm.
    """

    name: str
    n_experts: int
    taps: Mapping[str, Callable[[], Tap]] = field(repr=False)
    output: Callable[[], Tap] = field(repr=False)
    routes: Callable[[Mapping[str, Tensor]], Routes] = field(repr=False)
    stacked: StackedExperts | None = field(repr=False, default=None)
    rows: Callable[[Mapping[str, Tensor], int], tuple[Tensor, Tensor]] | None = field(
        repr=False, default=None
    )
    residual_tap: Callable[[], Tap] | None = field(repr=False, default=None)
