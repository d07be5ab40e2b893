"""The backward lens on one page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tl_backward.lens import READ_BY_INPUT, BackwardLensResult, WeightReadout

SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": r"\x0d"}


def visible(token: str) -> str:
    r"""A token with its white space and control characters made visible.

    Everything that does not print - controls, formats such as zero-width and right-to-left marks,
    white space other than the plain space, surrogates - becomes ``\xNN``, ``\uNNNN`` or
    ``\UNNNNNNNN``. All else, the replacement character included, stays as it is.

    Example:
        >>> visible(" Rome\n"), visible("\u200b"), visible("")
        ('·Rome⏎', '\\u200b', '∅')
    """
    return "".join(map(_visible_character, token)) or "∅"


def _visible_character(character: str) -> str:
    if character in SIGNS:
        return SIGNS[character]
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def lens_page(result: BackwardLensResult) -> str:
    """One self-contained HTML page with a layer x token table for each weight.

    The last layer is on top. A cell shows the most and the least probable token and is coloured by
    the norm of the VJP, on a cube-root scale from 0 to the largest norm in its table; pointing at
    it, or focusing it, shows its ``top_k`` tokens. Where the update is exactly zero it is empty.

    Raises:
        ImportError: Without the extra ``plot``.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the page needs Jinja2: pip install 'tl-backward[plot]'") from error

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tl_backward"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["visible"] = visible
    return environment.get_template("lens.html.j2").render(
        result=result, tables=[_Table(readout, result) for readout in result.values()]
    )


@dataclass(frozen=True)
class _Cell:
    """What the page says about one weight at one layer and position."""

    level: float
    is_hit: bool
    target_rank: int
    norm: float
    vjp_norm: float
    top: list[tuple[str, float]]
    bottom: list[tuple[str, float]]


class _Table:
    """One weight as the template walks through it."""

    def __init__(self, readout: WeightReadout, result: BackwardLensResult) -> None:
        self.readout = readout
        self.kind = readout.kind
        self.positions: list[int] = result.positions.tolist()
        self.by_input = readout.kind in READ_BY_INPUT
        self.scale = readout.vjp_norms.max().item()
        self.hit_rank = 0 if self.by_input else result.d_vocab - 1

    def rows(self) -> Iterator[tuple[int, list[tuple[int, _Cell | None]]]]:
        """Each layer and its cells, the last layer first."""
        readout = self.readout
        empty = readout.zero_mask | (readout.vjp_norms == 0)
        top, bottom = readout.top_tokens(), readout.bottom_tokens()
        for i, layer in reversed(list(enumerate(readout.layers))):
            yield (
                layer,
                [
                    (position, None if empty[i, j] else self._cell(i, j, top[i][j], bottom[i][j]))
                    for j, position in enumerate(self.positions)
                ],
            )

    def _cell(self, i: int, j: int, top: list[str], bottom: list[str]) -> _Cell:
        readout = self.readout
        rank, vjp_norm = int(readout.target_ranks[i, j]), readout.vjp_norms[i, j].item()
        return _Cell(
            level=(vjp_norm / self.scale) ** (1 / 3),
            is_hit=rank == self.hit_rank,
            target_rank=rank,
            norm=readout.norms[i, j].item(),
            vjp_norm=vjp_norm,
            top=list(zip(top, readout.top_values[i, j].tolist(), strict=True)),
            bottom=list(zip(bottom, readout.bottom_values[i, j].tolist(), strict=True)),
        )
