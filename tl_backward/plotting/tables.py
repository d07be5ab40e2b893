"""The contents of figures and pages as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """The readout of one vector.

    Attributes:
        level: Norm on the cube-root scale, where 1 is the table's largest.
        is_hit: Whether a target is where the method expects it: the most probable token of an
            input, the least probable token of a VJP.
        ranks: Targets and their ranks.
        norm: Norm of the vector.
        vjp_norm: Norm of the VJP at the weight's own output.
        top: Top tokens and their values, outermost first.
        bottom: Bottom tokens and their values, outermost first.
        experts: Experts of the token and their routing weights; empty for dense layers.
    """

    level: float
    is_hit: bool
    ranks: list[tuple[str, int]]
    norm: float
    vjp_norm: float
    top: list[tuple[str, float]]
    bottom: list[tuple[str, float]]
    experts: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Table:
    """The readout of one kind for one prompt.

    Attributes:
        kind: The kind that was read, e.g. ``"W_out"``.
        is_weight: Whether the kind is a weight.
        by_input: Whether the kind is a weight that is read by its input.
        top_counts: Whether a step moves towards the top tokens: for inputs, and for every kind in
            the descent direction.
        ends: Probability of the top and the bottom tokens: most and least, or least and most for
            VJPs in the descent direction.
        positions: Positions that were read.
        tokens: Their tokens.
        headers: Row headers: the layer of a weight, otherwise the label.
        targets: Targets at each position.
        ranks: Their ranks, ``[entry][position][target]``; -1 where nothing was read.
        norms: Norm of each vector, ``[entry][position]``.
        scale: Largest norm of a VJP, which has level 1.
        has_tokens: Whether tokens of both ends were kept.
        cells: ``[entry][position]``; None where the update is zero.
        left_out: Requested layers without a site of this weight.
    """

    kind: str
    is_weight: bool
    by_input: bool
    top_counts: bool
    ends: tuple[str, str]
    positions: list[int]
    tokens: list[str]
    headers: list[str]
    targets: list[list[str]]
    ranks: list[list[list[int]]]
    norms: list[list[float]]
    scale: float
    has_tokens: bool
    cells: list[list[Cell | None]]
    left_out: list[int]

    def rows(self) -> Iterator[tuple[str, list[Cell | None]]]:
        """Each header and its cells, the last layer first.

        Raises:
            ValueError: If no tokens were kept.
        """
        if not self.has_tokens:
            raise ValueError("a table needs a lens run with top_k and bottom_k of at least 1")
        return reversed(list(zip(self.headers, self.cells, strict=True)))


@dataclass(frozen=True)
class LensTables:
    """The tables of one prompt and their heading.

    Attributes:
        tables: Tables by kind.
        prompt_tokens: Tokens of the prompt.
        loss: The differentiated loss.
        loss_target: The target whose negative log-likelihood is the loss; None for another loss.
        d_vocab: Size of the vocabulary.
        value: Type of the tokens' values: ``"logit"``, ``"log_prob"`` or ``"probability"``.
        has_targets: Whether ranks of targets were kept.
        ranks_by_token: Whether the target has several tokens, so that each position ranks its own.
        is_normalized: Whether vectors were scaled to unit length before they were read.
        is_descent: Whether the ends of the VJPs' readouts were swapped.
    """

    tables: dict[str, Table]
    prompt_tokens: list[str]
    loss: float
    loss_target: str | None
    d_vocab: int
    value: str
    has_targets: bool
    ranks_by_token: bool
    is_normalized: bool
    is_descent: bool

    @property
    def target_probability(self) -> float:
        """``exp(-loss)``: the target's probability, if the loss is a target's."""
        return math.exp(-self.loss)
