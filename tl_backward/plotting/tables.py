"""What figures and pages show of the lens, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One vector, read.

    Attributes:
        level: The norm on the cube-root scale: 1 is the largest of the table.
        is_hit: Whether a target is where the method would have it: the most probable token of an
            input, the least probable one of a VJP.
        ranks: The targets and their ranks.
        norm: Norm of the vector.
        vjp_norm: Norm of the VJP at the weight's own output.
        top: The tokens at the top and their values, the outermost first.
        bottom: Those at the bottom.
    """

    level: float
    is_hit: bool
    ranks: list[tuple[str, int]]
    norm: float
    vjp_norm: float
    top: list[tuple[str, float]]
    bottom: list[tuple[str, float]]


@dataclass(frozen=True)
class Table:
    """One kind of weight, or of what else was read, of one prompt.

    Attributes:
        kind: ``"W_out"``, say.
        is_weight: Whether it is a weight.
        by_input: Whether it is a weight that is read by its input.
        top_counts: Whether a step moves towards the tokens at the top: those of what comes in, and
            of everything in the descent direction.
        ends: How probable the tokens at the top and at the bottom are: most and least, and the
            other way round for VJPs in the descent direction.
        positions: The positions that were read.
        tokens: Their tokens.
        headers: What stands beside each row: the layer of a weight, else the label.
        targets: The targets at each position.
        ranks: Their ranks, ``[entry][position][target]``; -1 where nothing was read.
        norms: The norm of each vector, ``[entry][position]``.
        scale: The largest norm of a VJP, which has the level 1.
        has_tokens: Whether tokens of both ends were kept.
        cells: ``[entry][position]``; None where the update is zero.
        left_out: The layers that were asked for and have no site of this weight.
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
            ValueError: When no tokens were kept.
        """
        if not self.has_tokens:
            raise ValueError("a table needs top_k and bottom_k of at least 1, in the lens")
        return reversed(list(zip(self.headers, self.cells, strict=True)))


@dataclass(frozen=True)
class LensTables:
    """The tables of one prompt, and what stands above them.

    Attributes:
        tables: By kind.
        prompt_tokens: The tokens of the prompt.
        loss: The loss that was differentiated.
        loss_target: The target whose negative log-likelihood it is; None for another loss.
        d_vocab: Size of the vocabulary.
        value: What the tokens' values are: ``"logit"``, ``"log_prob"`` or ``"probability"``.
        has_targets: Whether ranks of targets were kept.
        ranks_by_token: Whether the target has several tokens, and each position its own of them.
        is_normalized: Whether vectors were scaled to unit length before they were read.
        is_descent: Whether the ends of VJPs' readouts were exchanged.
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
        """``exp(-loss)``, which is the target's probability where the loss is a target's."""
        return math.exp(-self.loss)
