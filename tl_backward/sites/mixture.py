"""The experts of one layer, and where tokens enter and leave them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from tl_backward.sites.stacked_experts import StackedExperts
from tl_backward.sites.tap import Tap


class Routes(NamedTuple):
    """To which experts each token goes, and with what weights.

    Attributes:
        experts: The experts of each token.
        weights: What the output of each of them is multiplied by; in Llama 4, its input.
    """

    experts: Int[Tensor, "token k"]
    weights: Float[Tensor, "token k"]


@dataclass(frozen=True, eq=False)
class Mixture:
    """The experts of one layer, which all of their matrices' sites refer to.

    Attributes:
        name: ``"blocks.5.mlp.experts"``.
        n_experts: How many there are.
        taps: What has to be seen in the forward pass, by name; ``"input"`` is what all experts of a
            token are given.
        output: Where the sum of what the experts give is read.
        routes: The routes, from what the taps have seen.
        stacked: The experts' weights and functions, where they are in one module. The factors of
            each of them are then computed anew from input and output; else each matrix is read at a
            module of its own.
        rows: For a matrix that is read at a module of its own, which of the rows that pass there
            are those of an expert, and the tokens that they are of.
        residual_tap: Where the output is read behind a post-norm; None where there is none.
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
