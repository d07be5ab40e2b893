"""The result of one lens call."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

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


class RoutedTokens(NamedTuple):
    """The experts of each token in one layer.

    Attributes:
        experts: Indices of the experts; -1 at padding after shorter texts.
        weights: The routing weights.
    """

    experts: Int[Tensor, "*batch pos k"]
    weights: Float[Tensor, "*batch pos k"]


@dataclass(frozen=True, eq=False)
class BackwardLensResult(Mapping[str, Readout]):
    """The result of a lens call: a :class:`Readout` for each kind that was read.

    The result keeps no reference to the model, and all tensors are on the CPU. With several
    prompts, the batch axis follows the layers, and :meth:`example` selects one prompt.

    Attributes:
        readouts: Readouts by kind: ``result["W_out"]`` is ``result.readouts["W_out"]``.
        str_tokens: Tokens of the text, or a list per prompt.
        positions: Positions that were read, or a list per prompt.
        target_ids: Tokens that are ranked: the targets that all rows share, or one for all, per
            prompt ``[batch]`` or per row ``[*batch, pos]``. Default: the loss's target. If it has
            several tokens, a position that predicts one of them has that token; any other position
            has the first.
        target: The same as strings.
        target_names: Token ids of each target, keyed by the string that was passed and by the
            decoded string.
        target_positions: Positions that predict the loss's target, or a list per prompt, as in
            :class:`BackwardCache`. Empty for a ``loss_fn``.
        loss: The differentiated loss of every prompt; in nats for a target.
        loss_target: The target whose negative log-likelihood is the loss, as a string, or a list
            for several prompts; None for a ``loss_fn``.
        loss_target_ids: Its tokens, or a list per prompt; empty for a ``loss_fn``.
        d_vocab: Size of the vocabulary.
        normalize: Whether vectors were scaled to unit length before they were read.
        return_type: Type of the values: ``"logits"``, ``"log_probs"`` or ``"probs"``.
        direction: ``"gradient"``, or ``"descent"`` if the ends of the VJPs' readouts were swapped.
        weights_processing: As in :class:`BackwardCache`.
        left_out: Requested layers without a site, by kind of weight.
        experts: Experts and routing weights of every token, by ``"blocks.5.mlp.experts"``, for the
            mixtures of experts that were read.
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
    experts: dict[str, RoutedTokens] = field(default_factory=dict)

    @property
    def is_batch(self) -> bool:
        """Whether the prompts were a batch, possibly a list of one."""
        return isinstance(self.positions, list)

    def __getitem__(self, kind: str) -> Readout:
        try:
            return self.readouts[kind]
        except KeyError:
            raise KeyError(f"{kind!r} was not read; available: {', '.join(self)}") from None

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
        """Notebook tables of the last position: weights by layer, then the residual stream.

        They show the outermost token at each end, or the value of every token of ``vocab``.
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
        """The result of one prompt of a batch.

        Raises:
            ValueError: If the result has a single prompt and no batch axis.
            IndexError: If the batch has fewer prompts.
        """
        if not self.is_batch:
            raise ValueError("this result has a single prompt and no batch axis")
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
            experts={
                name: RoutedTokens(of_all.experts[b, :n], of_all.weights[b, :n])
                for name, of_all in self.experts.items()
            },
        )

    def rank_trajectory(
        self, target: str | int | None = None, weight: str | None = None
    ) -> Int[Tensor, "entry *batch_and_pos"]:
        """Rank of a target in one weight's readout, layer by layer.

        Args:
            target: String or id of one target, if the lens ran with several. The string may be the
                one passed to the lens or the decoded token. Pass a target of several tokens as a
                whole: each position has the rank of the token that it predicts.
            weight: The kind to show. Default: W_out if it was read, otherwise the first.

        Raises:
            KeyError: If the kind was not read.
            ValueError: If the lens ran with other targets, or without any.
        """
        readout = self[weight or default_kind(self)]
        ids = self.target_ids.reshape(-1).tolist()
        wanted: Any = self.target_names.get(target) if isinstance(target, str) else (target,)
        if not ids:
            raise ValueError("the lens ran without a target; pass targets= to the lens")
        each = [(token,) for token in ids]
        if readout.has_several_targets:
            if target is None and len(ids) > 1:
                raise ValueError(f"pass target=, one of {self.target}")
            if target is None or wanted in each:
                return readout.target_ranks[..., 0 if target is None else each.index(wanted)]
        elif target is None or {wanted} == set(self._loss_targets if self.ranks_by_token else each):
            return readout.target_ranks
        shown = self.loss_target if self.ranks_by_token else self.target
        raise ValueError(f"target={target!r}: the lens ran with {shown!r}")

    @property
    def prompt_tokens(self) -> list[Any]:
        """``str_tokens`` without the target tokens that were appended to the prompt."""
        if self.is_batch:
            each = zip(self.str_tokens, self.target_positions, strict=True)
            return [tokens[: _length_of_prompt(predicting)] for tokens, predicting in each]
        return self.str_tokens[: _length_of_prompt(self.target_positions)]

    @property
    def ranks_by_token(self) -> bool:
        """Whether a loss target has several tokens, so that each position ranks its own token."""
        ranked = set(self.target_names.values())
        return any(len(ids) > 1 and ids in ranked for ids in self._loss_targets)

    @property
    def _loss_targets(self) -> list[tuple[int, ...]]:
        """Token ids of the loss target of every prompt."""
        ids: list[Any] = self.loss_target_ids
        return [tuple(one) for one in (ids if self.is_batch else [ids])]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per weight, layer, (prompt,) position and kept token.

        Columns: ``weight, label, layer``, ``example`` for several prompts, ``position, str_token,
        norm, vjp_norm, entropy, target_rank``, ``end``, ``k``, ``token_id, token``, and the token's
        value: ``log_prob``, ``logit`` or ``probability``. ``end`` is ``top`` or ``bottom``, where
        ``k`` is 0 for the outermost token, or ``vocab`` for the tokens of ``vocab`` in their order.
        With one target (for all, per prompt or per row), every row has its rank; targets that
        differ by row are named in ``target``. With several targets, each has rows of its own with
        ``end`` ``target``, its rank and its value; the other rows have no rank. A zero vector gives
        one row without a token.
        """
        return data_frame(self)

    def plot(self, kind: FigureKind = "table", weight: str | None = None) -> Figure:
        """A plotly figure of the result of one prompt.

        Args:
            kind: ``"table"``: layer x token, with the top and bottom token, coloured by the norm of
                the VJP, details on hover. ``"ranks"``: the target's rank by layer, a line for each
                position. ``"norms"``: the norms of all vectors that were read.
                ``"forward_and_backward"``: the forward lens beside the table; needs
                ``forward=True`` in the lens call.
            weight: The kind to show. Default: W_out if it was read, otherwise the first.

        Raises:
            ImportError: Without the extra ``plot``.
            KeyError: If the kind was not read.
            ValueError: For several prompts, or if the figure needs vectors that were not read.
        """
        from tl_backward.plotting import lens_figure

        return lens_figure(lens_tables(self), kind, weight or default_kind(self))

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page with a layer x token table for each weight.

        Cells show the top and the bottom token; their colour is the norm of the VJP.

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
    """The kind to show by default: W_out if it was read, otherwise the first."""
    return "W_out" if "W_out" in result else next(iter(result))


def _length_of_prompt(predicting: Any) -> int | None:
    """Length of the prompt, whose last token predicts the target's first."""
    return int(predicting[0]) + 1 if len(predicting) else None
