"""The readout of arbitrary vectors; zero rows are skipped."""

from __future__ import annotations

import re
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tl_backward._precision import full_precision, stable_norm
from tl_backward.capture.tokens import decode_each
from tl_backward.lens._options import ReadoutOptions
from tl_backward.lens._targets import Targets
from tl_backward.lens._vocabulary import read_vocabulary
from tl_backward.lens.readout import Readout, is_forward
from tl_backward.sites import Model, unembed
from tl_backward.sites.names import layer_of
from tl_backward.translators import Translator


def read_vectors(
    model: Model,
    kind: str,
    labels: list[str],
    vectors: Float[Tensor, "entry *lead d_model"],
    targets: Targets,
    options: ReadoutOptions,
) -> Readout:
    """Read every nonzero vector.

    Raises:
        ValueError: If a vector is not finite, or the translator changes the shape.
    """
    layers = [layer_of_entry(label) for label in labels]
    norms = stable_norm(vectors, dim=-1)
    zero_mask = norms == 0
    if options.lens is not None:
        each = zip(vectors, layers, strict=True)
        with full_precision(vectors.device):
            vectors = torch.stack([_translated(options.lens, v, layer) for v, layer in each])
    ids = targets.per_row.expand(*vectors.shape[:-1], -1)
    rows = vectors[~zero_mask]
    if options.normalize:
        rows = rows / stable_norm(rows, dim=-1).unsqueeze(-1)
    if not rows.isfinite().all():
        from_lens = "" if options.lens is None else " returned by lens"
        raise ValueError(f"{kind}: the vectors{from_lens} are not finite")
    flipped = options.direction == "descent" and not is_forward(kind)
    ends = (options.top_k, options.bottom_k)
    top_k, bottom_k = ends[::-1] if flipped else ends
    read = read_vocabulary(
        rows,
        partial(unembed, model, apply_ln=options.apply_ln),
        ids[~zero_mask.cpu()],
        top_k=top_k,
        bottom_k=bottom_k,
        vocab=options.vocab,
        return_type=options.return_type,
        chunk_size=options.chunk_size,
    )
    if flipped:
        read = read.reversed(int(model.cfg.d_vocab))

    def scatter(values: Tensor) -> Tensor:
        empty = torch.nan if values.is_floating_point() else -1
        whole = values.new_full((*zero_mask.shape, *values.shape[1:]), empty)
        whole[zero_mask.logical_not().to(values.device)] = values
        return whole.cpu()

    def of_targets(values: Tensor) -> Tensor:
        return scatter(values) if targets.several else scatter(values.squeeze(-1))

    shown = (read.top_ids.cpu(), read.bottom_ids.cpu(), options.vocab, targets.per_row)
    kept = torch.cat([ids.flatten() for ids in shown]).unique().tolist()
    return Readout(
        kind=kind,
        labels=labels,
        layers=layers,
        top_ids=scatter(read.top_ids),
        top_values=scatter(read.top_values),
        bottom_ids=scatter(read.bottom_ids),
        bottom_values=scatter(read.bottom_values),
        target_ranks=of_targets(read.target_ranks),
        target_values=of_targets(read.target_values),
        vocab_ids=scatter(options.vocab.expand(len(rows), -1)),
        vocab_values=scatter(read.vocab_values),
        entropy=scatter(read.entropy),
        norms=norms.cpu(),
        vjp_norms=norms.cpu(),
        zero_mask=zero_mask.cpu(),
        vocabulary=dict(zip(kept, decode_each(model, kept), strict=True)),
    )


def _translated(
    lens: Translator, vectors: Float[Tensor, "*rows d_model"], layer: int | None
) -> Float[Tensor, "*rows d_model"]:
    translated = lens(vectors, layer)
    shape = getattr(translated, "shape", None)
    if shape != vectors.shape:
        got = translated if shape is None else f"the shape {list(shape)}"
        raise ValueError(
            f"lens returned {got} for vectors of shape {list(vectors.shape)}; it must return "
            "vectors of the same shape"
        )
    return translated


def layer_of_entry(label: str) -> int | None:
    """The layer in a site's name or in a label such as ``3_pre``, ``3_mlp_out`` or ``L3H0``."""
    found = re.match(r"(\d+)_|L(\d+)H", label)
    return int(found[1] or found[2]) if found else layer_of(label)
