"""The part of a cache that the lens reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tl_backward.cache import BackwardCache
from tl_backward.cache.residual import SliceInput
from tl_backward.cache.rows import Positions, kept_positions, plain_index, selected
from tl_backward.sites import FoundSites, Model, weights_processing


class Selection:
    """The selected prompts and positions of a cache."""

    def __init__(self, cache: BackwardCache, batch_slice: SliceInput, positions: Positions) -> None:
        if batch_slice is not None and not cache.is_batch:
            raise ValueError("batch_slice selects from several prompts, but there is only one")
        every = cache.positions if cache.is_batch else [cache.positions]
        self._lengths = [len(of_text) for of_text in every]
        has = "this batch has prompts"
        self.chosen = selected(batch_slice, len(every), "batch_slice", has).tolist()
        self._kept = [
            kept_positions(positions, self._lengths[b], b if cache.is_batch else None)
            for b in self.chosen
        ]
        self._single = not cache.is_batch or isinstance(plain_index(batch_slice), int)
        self.positions = [every[b][kept] for b, kept in zip(self.chosen, self._kept, strict=True)]
        self.str_tokens = [
            cache.str_tokens[b] if cache.is_batch else cache.str_tokens for b in self.chosen
        ]
        n_rows = max(map(len, self._kept))
        self.shape = [n_rows] if self._single else [len(self._kept), n_rows]
        self.loss = self.whole(cache.loss.reshape(-1)[self.chosen])
        predicting = cache.target_positions if cache.is_batch else [cache.target_positions]
        self.target_positions = [predicting[b] for b in self.chosen]
        ids = cache.target_ids.reshape(len(every), -1)[self.chosen]
        self.target_ids = [of_text[of_text >= 0] for of_text in ids]
        self.targets = self._targets(n_rows) if ids.shape[1] else None

    def whole(self, each: Any) -> Any:
        """The values of all prompts, or the value itself for a single prompt."""
        return each[0] if self._single else each

    def _targets(self, n_rows: int) -> Int[Tensor, "..."]:
        """One target token per text, or per row if any target has several tokens.

        A row whose position predicts a target token gets that token; other rows get the first.
        """
        if all(len(ids) == 1 for ids in self.target_ids):
            return self.whole(torch.cat(self.target_ids))
        of_rows = torch.stack([ids[0].repeat(n_rows) for ids in self.target_ids])
        for row, ids, predicting, positions in zip(
            of_rows, self.target_ids, self.target_positions, self.positions, strict=True
        ):
            for token, position in zip(ids, predicting, strict=True):
                row[: len(positions)][positions == position] = token
        return self.whole(of_rows)

    def rows(
        self, tensor: Shaped[Tensor, "*batch n d"], padding: int = 0
    ) -> Shaped[Tensor, "*chosen pos d"]:
        """The selected rows; shorter texts are padded on the right."""
        if tensor.ndim == 3:
            texts: Sequence[Tensor] = tensor.unbind(0)
        elif len(tensor) == sum(self._lengths):
            texts = tensor.split(self._lengths)
        else:
            raise NotImplementedError(
                "the lens reads weights that a forward pass uses once, but the blocks of this "
                "model run several times"
            )
        chosen = [texts[b][kept] for b, kept in zip(self.chosen, self._kept, strict=True)]
        return (
            chosen[0]
            if self._single
            else pad_sequence(chosen, batch_first=True, padding_value=padding)
        )


def require_same_model(model: Model, found: FoundSites, cache: BackwardCache) -> None:
    """Refuse a cache of another model, or of the same model with differently processed weights.

    Raises:
        TypeError: If ``cache`` is not a :class:`BackwardCache`.
        ValueError: If its sites, layers, token ids or weight processing differ from the model's.
    """
    if not isinstance(cache, BackwardCache):
        raise TypeError(
            "cache must be a BackwardCache from run_with_backward_cache, got "
            f"{type(cache).__name__}"
        )
    cfg, layers = model.cfg, cache.residual.n_layers
    tokens = cache.tokens if cache.is_batch else [cache.tokens]
    last = int(torch.cat([*tokens, cache.target_ids.flatten()]).max())
    sites = {site.name: site for site in found.sites}
    differences = [
        f"its {name} is {g.shape}"
        for name, g in cache.factors.items()
        if name not in sites or g.shape != (sites[name].d_in, sites[name].d_out)
    ]
    differences += [f"it has {layers} layers"] * (layers != cfg.n_layers)
    differences += [f"it holds the token id {last}"] * (last >= cfg.d_vocab)
    if differences:
        raise ValueError(
            f"cache comes from another model: {differences[0]}, which does not match this model"
        )
    processing = weights_processing(model)
    if cache.weights_processing != processing:
        raise ValueError(
            f"cache comes from other weights: its weights were {cache.weights_processing}, the "
            f"model's are {processing}; capture again"
        )


def parts_of_residual(
    cache: BackwardCache, which: str, incl_mid: bool, layers: Collection[int] | None
) -> dict[str, Tensor]:
    """The VJPs of the residual stream selected by ``which``, keyed by label."""
    residual = cache.residual
    if which == "accumulated":
        return residual.accumulated(None, incl_mid, mlp_input=False, layers=layers)
    if which == "decomposed":
        return residual.decomposed(
            None, mlp_input=False, mode="all", incl_embeds=True, layers=layers
        )
    return residual.by_head(None, incl_remainder=False, layers=layers)
