"""What the lens saw in one run."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

from tl_backward._integers import as_ranges
from tl_backward.lens._vocabulary import ReturnType
from tl_backward.lens.readout import VALUE_COLUMNS, Readout, is_weight_kind
from tl_backward.lens.tables import data_frame, lens_tables

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure

FigureKind: TypeAlias = Literal["table", "ranks", "norms", "forward_and_backward"]


@dataclass(frozen=True, eq=False)
class BackwardLensResult(Mapping[str, Readout]):
    """What the lens saw: a :class:`Readout` for each kind of weight.

    It keeps no reference to the model; all tensors are on the CPU. Of several prompts, the batch
    axis comes behind the layers, and :meth:`example` gives one of them.

    Attributes:
        readouts: The readouts by kind: ``result["W_out"]`` is ``result.readouts["W_out"]``.
        str_tokens: The tokens of the text, or a list of them for several.
        positions: The positions that were read, or a list of them.
        target_ids: The tokens that ranks are of. If ranks have an axis of several targets, these;
            else one, or one for each prompt, ``[batch]``, or for each row, ``[*batch, pos]``. By
            default the loss's target: where it has several tokens, a position that predicts one
            of them has that token, and any other position the first.
        target: The same as strings.
        target_names: The ids of a target by the strings that ask for it: as it was given, and
            decoded.
        target_positions: The positions that predict the loss's target, or a list of them, as in
            :class:`BackwardCache`. Empty for a ``loss_fn``.
        loss: The loss that was differentiated, of every prompt; a target's is in nats.
        loss_target: The target whose negative log-likelihood the loss is, as a string, or a list of
            them for several prompts; None for a ``loss_fn``.
        loss_target_ids: Its tokens, or a list of them; empty for a ``loss_fn``.
        d_vocab: Size of the vocabulary.
        normalize: Whether vectors were scaled to unit length before they were read.
        return_type: What values are: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        direction: ``"gradient"``, or ``"descent"`` if the ends of VJPs' readouts were exchanged.
        weights_processing: As in :class:`BackwardCache`.
        left_out: By kind of weight, the layers that were asked for and have no site of it.
    """

    readouts: dict[str, Readout]
    str_tokens: list[Any]
    positions: Int[Tensor, "pos"] | list[Int[Tensor, "_"]]
    target_ids: Int[Tensor, "..."]
    target: Any
    target_names: dict[str, tuple[int, ...]]
    target_positions: Int[Tensor, "k"] | list[Int[Tensor, "_"]]
    loss: Float[Tensor, "*batch"]
    loss_target: str | list[str] | None
    loss_target_ids: list[int] | list[list[int]]
    d_vocab: int
    normalize: bool
    return_type: ReturnType
    direction: Literal["gradient", "descent"]
    weights_processing: str
    left_out: dict[str, list[int]] = field(default_factory=dict)

    @property
    def is_batch(self) -> bool:
        """Whether it is of several prompts, also of a list of one."""
        return isinstance(self.positions, list)

    def __getitem__(self, kind: str) -> Readout:
        try:
            return self.readouts[kind]
        except KeyError:
            raise KeyError(f"{kind!r} was not read; there is {', '.join(self)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.readouts)

    def __len__(self) -> int:
        return len(self.readouts)

    def __repr__(self) -> str:
        n_layers = len(next(iter(self.values())).labels)
        if self.is_batch:
            of = f"{len(self.positions)} prompts, mean loss={self.loss.mean().item():.4f}"
        else:
            target = self.loss_target if self.ranks_by_token else self.target
            of = f"{len(self.positions)} positions, target={target!r}, loss={self.loss:.4f}"
        without = "".join(
            f"; no {kind} in {as_ranges(layers)}" for kind, layers in self.left_out.items()
        )
        return f"BackwardLensResult({', '.join(self)}; {n_layers} layers{without}, {of})"

    def _repr_html_(self) -> str:
        """What was kept at the last position as tables for a notebook: weights by layer, the rest.

        Of the ends the outermost token is shown, and of ``vocab`` the value of every token.
        """
        shown = f"<pre>{html.escape(repr(self))}</pre>"
        if self.is_batch or not len(self.positions):
            return shown
        frame = self.to_dataframe()
        last = frame[frame.position.eq(int(self.positions[-1])) & frame.end.ne("target")]
        last = last[last.k.eq(0) | last.end.eq("vocab")]
        is_weight, is_vocab = last.weight.map(is_weight_kind), last.end.eq("vocab")
        tokens, values = last.token.map(repr), last[VALUE_COLUMNS[self.return_type]]
        cells = last.assign(
            entry=last.label.where(~is_weight, last.layer.astype(str)),
            column=last.end.where(~is_vocab, tokens),
            cell=tokens.where(~is_vocab, values.map("{:.4g}".format)),
        )
        for _, part in cells.groupby(last.weight.where(~is_weight, ""), sort=False):
            table = part.pivot_table("cell", "entry", ["weight", "column"], "first", sort=False)
            table = table.rename_axis(index=None, columns=[None, None])
            shown += table.to_html(na_rep="")
        return shown

    def example(self, b: int) -> BackwardLensResult:
        """What the lens saw of one prompt of several.

        Raises:
            ValueError: When there is a single prompt.
            IndexError: When there are fewer prompts.
        """
        if not self.is_batch:
            raise ValueError("this result is of a single prompt")
        positions = self.positions[b]
        n = len(positions)
        has_several = next(iter(self.values())).has_several_targets
        axes = 0 if has_several else self.target_ids.ndim

        ids = self._loss_targets[b]
        is_one = self.ranks_by_token and len(ids) == 1

        def targets(each: Any) -> Any:
            of_prompt = each[b] if axes else each
            of_rows = of_prompt[:n] if axes == 2 else of_prompt
            return of_rows[0] if is_one else of_rows

        return replace(
            self,
            readouts={kind: r.example(b, n) for kind, r in self.items()},
            str_tokens=self.str_tokens[b],
            positions=positions,
            target_ids=targets(self.target_ids),
            target=targets(self.target),
            target_positions=self.target_positions[b],
            loss=self.loss[b],
            loss_target=None if self.loss_target is None else self.loss_target[b],
            loss_target_ids=list(ids),
        )

    def rank_trajectory(
        self, target: str | int | None = None, weight: str | None = None
    ) -> Int[Tensor, "entry *batch_and_pos"]:
        """Rank of a target in one weight's readout, layer by layer.

        Args:
            target: Which one, as a string or an id, if the lens was run with several. The string is
                that which the lens was given, or the token's own. Of a target of several tokens,
                the whole one: each position has the rank of the token that it predicts.
            weight: The kind of weight, or of what else was read. Default: W_out, or else the first.

        Raises:
            KeyError: When the weight was not read.
            ValueError: When the lens was run with other targets, or without any.
        """
        readout = self[weight or default_kind(self)]
        ids = self.target_ids.reshape(-1).tolist()
        wanted: Any = self.target_names.get(target) if isinstance(target, str) else (target,)
        if not ids:
            raise ValueError("the lens was run without a target; pass it targets=")
        each = [(token,) for token in ids]
        if readout.has_several_targets:
            if target is None and len(ids) > 1:
                raise ValueError(f"pass target=, one of {self.target}")
            if target is None or wanted in each:
                return readout.target_ranks[..., 0 if target is None else each.index(wanted)]
        elif target is None or {wanted} == set(self._loss_targets if self.ranks_by_token else each):
            return readout.target_ranks
        shown = self.loss_target if self.ranks_by_token else self.target
        raise ValueError(f"target={target!r}: the lens was run with {shown!r}")

    @property
    def prompt_tokens(self) -> list[Any]:
        """``str_tokens`` without those of the target that were appended to the prompt."""
        if self.is_batch:
            each = zip(self.str_tokens, self.target_positions, strict=True)
            return [tokens[: _length_of_prompt(predicting)] for tokens, predicting in each]
        return self.str_tokens[: _length_of_prompt(self.target_positions)]

    @property
    def ranks_by_token(self) -> bool:
        """Whether a target of the loss has several tokens, and each position its own of them."""
        ranked = set(self.target_names.values())
        return any(len(ids) > 1 and ids in ranked for ids in self._loss_targets)

    @property
    def _loss_targets(self) -> list[tuple[int, ...]]:
        """The loss's target of every prompt."""
        ids: list[Any] = self.loss_target_ids
        return [tuple(one) for one in (ids if self.is_batch else [ids])]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per weight, layer, (prompt,) position and token that was kept.

        Columns: ``weight, label, layer``, ``example`` for several prompts, ``position, str_token,
        norm, vjp_norm, entropy, target_rank``, ``end``, ``k``, ``token_id, token``, and the token's
        value: ``log_prob``, ``logit`` or ``probability``. ``end`` is ``top`` or ``bottom``, where
        ``k`` is 0 for the outermost token, or ``vocab`` for the tokens of ``vocab`` in their order.
        Of one target (for all, or for each prompt or row), all rows have the rank; where rows have
        targets of their own, ``target`` before it names them. Each of several has a row of its own,
        ``end`` ``target``, with its rank and value, and other rows have no rank. A zero row gives
        one line without token.
        """
        return data_frame(self)

    def plot(self, kind: FigureKind = "table", weight: str | None = None) -> Figure:
        """A plotly figure of what the lens saw of one prompt.

        Args:
            kind: ``"table"``: layer x token, the token at the top and at the bottom, coloured by
                the norm of the VJP, with more when pointed at. ``"ranks"``: the target's rank
                through the layers, a line for each position. ``"norms"``: the norms of all that was
                read.
                ``"forward_and_backward"``: the forward lens and the table side by side, of a lens
                that was run with ``forward=True``.
            weight: Which weight, or what else was read. Default: W_out, or else the first.

        Raises:
            ImportError: Without the extra ``plot``.
            KeyError: When the weight was not read.
            ValueError: For several prompts, or when what the figure shows was not read.
        """
        from tl_backward.plotting import lens_figure

        return lens_figure(lens_tables(self), kind, weight or default_kind(self))

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page with a layer x token table for each weight.

        Cells show the token at the top and at the bottom; their colour is the norm of the VJP.

        Returns:
            The path of the page.

        Raises:
            ImportError: Without the extra ``plot``.
            ValueError: For several prompts, or a lens that kept no tokens.
        """
        from tl_backward.plotting import lens_page

        path = Path(path)
        path.write_text(lens_page(lens_tables(self)), encoding="utf-8")
        return path


def default_kind(result: Mapping[str, Readout]) -> str:
    """What is shown of a result when nothing else is asked for: W_out, or else the first."""
    return "W_out" if "W_out" in result else next(iter(result))


def _length_of_prompt(predicting: Any) -> int | None:
    """The first token of a target is predicted by the last one of its prompt."""
    return int(predicting[0]) + 1 if len(predicting) else None
