"""What a figure or a page shows of one readout: cells by layer and position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tl_backward.lens.result import READ_FORWARD, BackwardLensResult
from tl_backward.sites.kinds import READ_BY_INPUT, READ_BY_VJP


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


class Table:
    """One kind of weight, or of what else was read, of one prompt.

    Attributes:
        kind: ``"W_out"``, say.
        is_weight: Whether it is a weight.
        by_input: Whether it is a weight that is read by its input.
        top_counts: Whether it is the tokens at the top that a step moves towards: those of what
            comes in, and of all in the descent direction.
        ends: How probable the tokens at the top and at the bottom are: most and least, and the
            other way round of VJPs in the descent direction.
        positions: The positions that were read.
        tokens: Their tokens.
        headers: What stands beside each row: the layer of a weight, else the label.
        scale: The largest norm, which has the level 1.
    """

    def __init__(self, result: BackwardLensResult, kind: str) -> None:
        if isinstance(result.positions, list):
            raise ValueError(
                "tables are of one prompt: take result.example(b), or the lens with batch_slice=b"
            )
        self.result, self.readout, self.kind = result, result[kind], kind
        self.is_weight = kind in READ_BY_INPUT + READ_BY_VJP
        self.by_input = kind in READ_BY_INPUT
        self.top_counts = kind in READ_FORWARD or result.direction == "descent"
        turned = result.direction == "descent" and kind not in READ_FORWARD
        self.ends = ("least", "most") if turned else ("most", "least")
        self.positions: list[int] = torch.as_tensor(result.positions).tolist()
        self.tokens: list[str] = [result.str_tokens[position] for position in self.positions]
        self.headers = [
            str(layer) if self.is_weight else label
            for layer, label in zip(self.readout.layers, self.readout.labels, strict=True)
        ]
        self.scale = self.readout.vjp_norms.max().item()

    def rows(self) -> Iterator[tuple[str, list[Cell | None]]]:
        """Each header and its cells, the last layer first; None where the update is zero.

        Raises:
            ValueError: When no tokens were kept.
        """
        if not self.readout.top_ids.shape[-1] or not self.readout.bottom_ids.shape[-1]:
            raise ValueError("a table needs top_k and bottom_k of at least 1, in the lens")
        top, bottom = self.readout.top_tokens(), self.readout.bottom_tokens()
        empty = self.readout.zero_mask | (self.readout.vjp_norms == 0)
        for i, header in reversed(list(enumerate(self.headers))):
            yield (
                header,
                [
                    None if empty[i, j] else self._cell(i, j, top[i][j], bottom[i][j])
                    for j in range(len(self.positions))
                ],
            )

    def targets(self, j: int) -> list[str]:
        """The targets at one position: one or several for all, or one of its own."""
        targets = self.result.target
        if not isinstance(targets, list):
            return [targets]
        return targets if self.readout.has_several_targets else [targets[j]]

    def _cell(self, i: int, j: int, top: list[str], bottom: list[str]) -> Cell:
        readout = self.readout
        ranks = list(
            zip(self.targets(j), readout.target_ranks[i, j].reshape(-1).tolist(), strict=True)
        )
        hit_rank = 0 if self.top_counts else self.result.d_vocab - 1
        vjp_norm = readout.vjp_norms[i, j].item()
        return Cell(
            level=(vjp_norm / self.scale) ** (1 / 3),
            is_hit=any(rank == hit_rank for _, rank in ranks),
            ranks=ranks,
            norm=readout.norms[i, j].item(),
            vjp_norm=vjp_norm,
            top=list(zip(top, readout.top_values[i, j].tolist(), strict=True)),
            bottom=list(zip(bottom, readout.bottom_values[i, j].tolist(), strict=True)),
        )
