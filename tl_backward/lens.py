"""The logit lens of the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_backward.cache import BackwardCache
from tl_backward.capture import Positions, run_with_backward_cache
from tl_backward.readout import read_vocabulary
from tl_backward.sites import Model, unembed
from tl_backward.tokens import decode_each

if TYPE_CHECKING:
    import pandas as pd

READ_BY_INPUT = ("W_Q", "W_K", "W_V", "W_in", "W_gate")
READ_BY_VJP = ("W_O", "W_out")


@dataclass(frozen=True, eq=False)
class WeightReadout:
    """One kind of weight, read in the vocabulary at every layer and position.

    Matrices that read the residual stream (W_in, W_gate, W_Q, W_K, W_V) are read by their inputs
    ``x_i``, of which the *most* probable tokens are what the update imprints (Eq 9). Those that
    write to it (W_out, W_O) are read by their VJPs ``delta_i``, of which the *least* probable
    tokens are what a descent step shifts the output towards, and the most probable ones what it
    takes away (Eq 10). Signs are raw; no vector is ever negated.

    Rows whose vector is zero are not read: their ids and ranks are -1 and their values nan.

    Attributes:
        kind: ``"W_out"``.
        layers: The layer that each entry of the first axis belongs to.
        top_ids: The most probable tokens, most probable first.
        top_values: Their log-probabilities, in nats.
        bottom_ids: The least probable tokens, least probable first.
        bottom_values: Their log-probabilities, in nats.
        target_ranks: Rank of the target: 0 is the most probable token, ``d_vocab - 1`` the least.
        norms: Norm of each vector that was read, before any normalisation.
        vjp_norms: Norm of ``delta_i`` at the weight's own output.
        zero_mask: Where the vector that was to be read is zero.
        vocabulary: The strings of all token ids above.
    """

    kind: str
    layers: list[int]
    top_ids: Int[Tensor, "layer pos k"]
    top_values: Float[Tensor, "layer pos k"]
    bottom_ids: Int[Tensor, "layer pos k"]
    bottom_values: Float[Tensor, "layer pos k"]
    target_ranks: Int[Tensor, "layer pos"]
    norms: Float[Tensor, "layer pos"]
    vjp_norms: Float[Tensor, "layer pos"]
    zero_mask: Bool[Tensor, "layer pos"]
    vocabulary: dict[int, str]

    def top_tokens(self) -> list[list[list[str]]]:
        """The most probable tokens as strings, ``[layer][position][k]``; none for a zero row."""
        return self._strings(self.top_ids)

    def bottom_tokens(self) -> list[list[list[str]]]:
        """The least probable tokens as strings, ``[layer][position][k]``; none for a zero row."""
        return self._strings(self.bottom_ids)

    def _strings(self, ids: Int[Tensor, "layer pos k"]) -> list[list[list[str]]]:
        return [
            [[self.vocabulary[i] for i in row if i >= 0] for row in layer] for layer in ids.tolist()
        ]


@dataclass(frozen=True, eq=False)
class BackwardLensResult(Mapping[str, WeightReadout]):
    """What the lens saw: a :class:`WeightReadout` for each kind of weight.

    It keeps no reference to the model; all tensors are on the CPU.

    Attributes:
        readouts: The readouts by kind: ``result["W_out"]`` is ``result.readouts["W_out"]``.
        str_tokens: The tokens of the prompt.
        positions: The positions that were read.
        target_ids: The target.
        target: The target as a string.
        loss: Its negative log-likelihood, in nats.
        d_vocab: Size of the vocabulary.
        normalize: Whether vectors were scaled to unit length before they were read.
        weights_processing: As in :class:`BackwardCache`.
    """

    readouts: dict[str, WeightReadout]
    str_tokens: list[str]
    positions: Int[Tensor, "pos"]
    target_ids: Int[Tensor, ""]
    target: str
    loss: Float[Tensor, ""]
    d_vocab: int
    normalize: bool
    weights_processing: str

    def __getitem__(self, kind: str) -> WeightReadout:
        try:
            return self.readouts[kind]
        except KeyError:
            raise KeyError(f"{kind!r} was not read; there is {', '.join(self)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.readouts)

    def __len__(self) -> int:
        return len(self.readouts)

    def __repr__(self) -> str:
        layers = next(iter(self.values())).layers
        return (
            f"BackwardLensResult({', '.join(self)}; {len(layers)} layers, "
            f"{len(self.positions)} positions, target={self.target!r}, loss={self.loss.item():.4f})"
        )

    def rank_trajectory(
        self, target: str | int | None = None, weight: str = "W_out"
    ) -> Int[Tensor, "layer pos"]:
        """Rank of the target in one weight's readout, layer by layer.

        Args:
            target: The target that the lens was run with, to be explicit about it.
            weight: The kind of weight.

        Raises:
            ValueError: When the lens was run with another target.
        """
        if target is not None and target not in (self.target, int(self.target_ids)):
            raise ValueError(f"target={target!r}: the lens was run with {self.target!r}")
        return self[weight].target_ranks

    def to_dataframe(self) -> pd.DataFrame:
        """One row per weight, layer, position, end of the readout and token.

        Columns: ``weight, layer, position, str_token, norm, vjp_norm, target_rank, end`` (``top``
        or ``bottom``), ``k`` (0 is the outermost), ``token_id, token, log_prob``. A zero row gives
        one line without token.
        """
        import pandas as pd

        return pd.DataFrame(
            [
                {"weight": kind, "layer": layer, **line}
                for kind, readout in self.items()
                for i, layer in enumerate(readout.layers)
                for line in self._lines(readout, i)
            ]
        ).astype({"target_rank": "Int64", "k": "Int64", "token_id": "Int64"})

    def to_html(self, path: str | Path) -> Path:
        """Write one self-contained page with a layer x token table for each weight.

        Cells show the most and the least probable token; their colour is the norm of the VJP.

        Returns:
            The path of the page.

        Raises:
            ImportError: Without the extra ``plot``.
        """
        from tl_backward.plotting import lens_page

        path = Path(path)
        path.write_text(lens_page(self), encoding="utf-8")
        return path

    def _lines(self, readout: WeightReadout, i: int) -> Iterator[dict[str, Any]]:
        for j, position in enumerate(self.positions.tolist()):
            rank = int(readout.target_ranks[i, j])
            line = {
                "position": position,
                "str_token": self.str_tokens[position],
                "norm": float(readout.norms[i, j]),
                "vjp_norm": float(readout.vjp_norms[i, j]),
                "target_rank": None if rank < 0 else rank,
            }
            if readout.zero_mask[i, j]:
                yield line | {"end": None, "k": None, "token_id": None, "token": None}
                continue
            for end, ids, values in (
                ("top", readout.top_ids, readout.top_values),
                ("bottom", readout.bottom_ids, readout.bottom_values),
            ):
                for k, (token, value) in enumerate(
                    zip(ids[i, j].tolist(), values[i, j].tolist(), strict=True)
                ):
                    yield line | {
                        "end": end,
                        "k": k,
                        "token_id": token,
                        "token": readout.vocabulary[token],
                        "log_prob": value,
                    }


class BackwardLogitLens:
    """Reads the gradients of the attention and MLP matrices in the model's own vocabulary.

    Args:
        model: A TransformerLens model in eval mode.

    Example:
        >>> lens = BackwardLogitLens(model)
        >>> result = lens("Lionel Messi plays for", " Paris")
        >>> result["W_out"].bottom_tokens()[20][-1][0]   # layer 20, last token
        ' Paris'
    """

    def __init__(self, model: Model) -> None:
        self.model = model

    def __call__(
        self,
        prompt: str | Int[Tensor, "... pos"],
        target: str | int | Int[Tensor, "..."],
        *,
        weights: str | Iterable[str] = ("W_in", "W_out"),
        layers: int | Iterable[int] | None = None,
        positions: Positions = None,
        vjps: Literal["residual", "output"] = "residual",
        top_k: int = 10,
        normalize: bool = False,
        prepend_bos: bool | None = None,
        chunk_size: int = 64,
    ) -> BackwardLensResult:
        """Run the model forward and backward once and read what arrives at its weights.

        Args:
            prompt: Text, or the tokens of one prompt.
            target: The token whose negative log-likelihood after the prompt is differentiated.
            weights: Kinds of weights to read.
            layers: Layers to read; negative ones count from the last. Default: all.
            positions: Positions to read: an index, a slice or a list. Default: all.
            vjps: Which VJPs to read where a post-norm follows the weight (Gemma 2 and 3, OLMo 2,
                GLM-4 ...): those behind the norm, at the residual stream, or those at the
                weight's own output. Elsewhere the two are the same.
            top_k: How many of the most and of the least probable tokens to keep.
            normalize: Scale every vector to unit length first (the normalised logit lens, App H).
            prepend_bos: As in ``model.to_tokens``. Default: the model's own setting.
            chunk_size: Rows that are unembedded at once.

        Raises:
            ValueError: When ``top_k`` or ``chunk_size`` is out of range, and as
                :func:`run_with_backward_cache` does.
        """
        d_vocab = int(self.model.cfg.d_vocab)
        if not 1 <= top_k <= d_vocab:
            raise ValueError(f"top_k must be in [1, {d_vocab}], the vocabulary, got {top_k}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        weights = [weights] if isinstance(weights, str) else list(weights)
        for kind in ("W_E", "W_pos", "W_U"):
            if kind in weights:
                raise ValueError(
                    f"weights={kind!r} is not between two residual streams; the lens reads "
                    f"{', '.join(READ_BY_INPUT + READ_BY_VJP)}"
                )
        if vjps not in ("residual", "output"):
            raise ValueError(f"vjps must be 'residual' or 'output', got {vjps!r}")
        loss, cache = run_with_backward_cache(
            self.model,
            prompt,
            target,
            weights=weights,
            layers=layers,
            positions=positions,
            prepend_bos=prepend_bos,
        )
        if cache.target_ids.ndim:
            raise NotImplementedError(
                "the lens reads the gradient of one prompt and a target of one token for now; "
                "run_with_backward_cache takes several"
            )
        target_id = int(cache.target_ids)
        return BackwardLensResult(
            readouts={
                kind: self._read(kind, cache, target_id, vjps, top_k, normalize, chunk_size)
                for kind in weights
            },
            str_tokens=cache.str_tokens,
            positions=torch.as_tensor(cache.positions),
            target_ids=cache.target_ids,
            target=decode_each(self.model, [target_id])[0],
            loss=loss.cpu(),
            d_vocab=d_vocab,
            normalize=normalize,
            weights_processing=cache.weights_processing,
        )

    def _read(
        self,
        kind: str,
        cache: BackwardCache,
        target: int,
        vjps: Literal["residual", "output"],
        top_k: int,
        normalize: bool,
        chunk_size: int,
    ) -> WeightReadout:
        names = [name for name in cache if name.endswith(f".{kind}")]
        if kind in READ_BY_INPUT:
            read_from = [cache[name].inputs for name in names]
        elif vjps == "residual":
            read_from = [cache.residual_vjps(name) for name in names]
        else:
            read_from = [cache[name].vjps for name in names]
        vectors = torch.stack([rows.to(read_from[0].device) for rows in read_from])
        norms = vectors.norm(dim=-1)
        zero_mask = norms == 0
        rows = vectors[~zero_mask]
        if normalize:
            rows = rows / norms[~zero_mask].unsqueeze(-1)
        read = read_vocabulary(
            rows, partial(unembed, self.model), target, top_k=top_k, chunk_size=chunk_size
        )

        def scatter(values: Tensor) -> Tensor:
            empty = torch.nan if values.is_floating_point() else -1
            whole = values.new_full((*zero_mask.shape, *values.shape[1:]), empty)
            whole[~zero_mask] = values
            return whole.cpu()

        ids = torch.cat([read.top_ids, read.bottom_ids]).unique().tolist()
        return WeightReadout(
            kind=kind,
            layers=[int(name.split(".")[1]) for name in names],
            top_ids=scatter(read.top_ids),
            top_values=scatter(read.top_values),
            bottom_ids=scatter(read.bottom_ids),
            bottom_values=scatter(read.bottom_values),
            target_ranks=scatter(read.target_ranks),
            norms=norms.cpu(),
            vjp_norms=torch.stack([cache[name].vjps.norm(dim=-1).cpu() for name in names]),
            zero_mask=zero_mask.cpu(),
            vocabulary=dict(zip(ids, decode_each(self.model, ids), strict=True)),
        )
