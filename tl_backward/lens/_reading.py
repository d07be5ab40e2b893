"""How vectors are read: the lens's options, checked, and its readouts of any vectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_backward._integers import is_integer
from tl_backward._precision import full_precision, stable_norm
from tl_backward.capture.tokens import decode_each, each_token_id
from tl_backward.lens._vocabulary import ReturnType, read_vocabulary
from tl_backward.lens.readout import READ_FORWARD, VALUE_COLUMNS, Readout
from tl_backward.sites import Model, unembed
from tl_backward.translators import Translator

TOP_K = 10


@dataclass(frozen=True)
class Options:
    """How vectors are read, after all checks."""

    apply_ln: bool
    normalize: bool
    lens: Translator | None
    vocab: Int[Tensor, "v"]
    return_type: ReturnType
    top_k: int
    bottom_k: int
    direction: Literal["gradient", "descent"]
    chunk_size: int


@dataclass(frozen=True)
class Targets:
    """Whose ranks are wanted: as the result shows them, and for every row.

    Several are for all rows; otherwise there is one for all, for each prompt or for each row.
    """

    shown: Int[Tensor, "..."]
    per_row: Int[Tensor, "... t"]
    several: bool


def checked_options(
    model: Model,
    apply_ln: bool,
    normalize: bool,
    lens: Translator | None,
    vocab: str | int | Sequence[str | int] | Int[Tensor, "v"] | None,
    return_type: ReturnType,
    top_k: int | None,
    bottom_k: int | None,
    direction: Literal["gradient", "descent"],
    chunk_size: int,
) -> Options:
    """The options of :meth:`BackwardLogitLens.__call__`, with their defaults.

    Raises:
        TypeError: When the lens is no function, or the vocabulary no tokens.
        ValueError: When one is out of range, or two exclude each other.
    """
    d_vocab = int(model.cfg.d_vocab)
    if vocab is not None and (top_k is not None or bottom_k is not None):
        raise ValueError("pass vocab, or top_k and bottom_k, not both")
    ids = each_token_id(model, "vocab", [] if vocab is None else vocab)
    if ids.ndim > 1 or (vocab is not None and not ids.numel()):
        raise ValueError(f"vocab must be one or several tokens in one axis, got {vocab!r}")
    ids = ids.reshape(-1)
    top = (TOP_K if vocab is None else 0) if top_k is None else top_k
    bottom = top if bottom_k is None else bottom_k
    for name, k, least in (("top_k", top, int(top_k is not None)), ("bottom_k", bottom, 0)):
        if not is_integer(k) or not least <= k <= d_vocab:
            raise ValueError(
                f"{name} must be an integer in [{least}, {d_vocab}], the vocabulary, got {k!r}"
            )
    if not is_integer(chunk_size) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
    if lens is not None and not callable(lens):
        raise TypeError(
            f"lens must be a function f(vectors, layer) -> vectors, got {lens!r}; for a "
            "JacobianLens pass tl_backward.translators.through_jacobian_lens(it)"
        )
    if return_type not in VALUE_COLUMNS:
        raise ValueError(
            f"return_type must be 'logits', 'log_probs' or 'probs', got {return_type!r}"
        )
    if direction not in ("gradient", "descent"):
        raise ValueError(f"direction must be 'gradient' or 'descent', got {direction!r}")
    return Options(apply_ln, normalize, lens, ids, return_type, top, bottom, direction, chunk_size)


def targets_for(
    model: Model, targets: Any, rows: Sequence[int], of_loss: Int[Tensor, "..."] | None = None
) -> Targets:
    """Those that are asked for, or else the loss's, of prompts or of rows ``[*batch, pos]``."""
    if targets is None and of_loss is not None:
        of_rows = of_loss if of_loss.ndim == len(rows) else of_loss.unsqueeze(-1)
        return Targets(of_loss, of_rows.unsqueeze(-1), several=False)
    ids = each_token_id(model, "targets", [] if targets is None else targets)
    if isinstance(targets, Tensor) and targets.ndim:
        of_rows = _for_rows(ids, rows)
        return Targets(of_rows, of_rows.unsqueeze(-1), several=False)
    return Targets(ids, ids.reshape(-1), several=ids.ndim == 1)


def read_vectors(
    model: Model,
    kind: str,
    labels: list[str],
    vectors: Float[Tensor, "entry *lead d_model"],
    targets: Targets,
    options: Options,
) -> Readout:
    """The readout of all vectors but those that are zero.

    Raises:
        ValueError: When a vector is not finite, or the translator returns another shape.
    """
    layers = [layer_of(label) for label in labels]
    norms = stable_norm(vectors, dim=-1)
    zero_mask = norms == 0
    if options.lens is not None:
        each = zip(vectors, layers, strict=True)
        with full_precision(vectors.device):
            vectors = torch.stack([_translated(options.lens, of, layer) for of, layer in each])
    ids = targets.per_row.expand(*vectors.shape[:-1], -1)
    rows = vectors[~zero_mask]
    if options.normalize:
        rows = rows / stable_norm(rows, dim=-1).unsqueeze(-1)
    if not rows.isfinite().all():
        by_lens = "" if options.lens is None else " that lens returned"
        raise ValueError(f"{kind}: the vectors{by_lens} are not finite")
    turned = options.direction == "descent" and kind not in READ_FORWARD
    ends = (options.top_k, options.bottom_k)
    top_k, bottom_k = ends[::-1] if turned else ends
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
    if turned:
        read = read.reversed(int(model.cfg.d_vocab))

    def scatter(values: Tensor) -> Tensor:
        empty = torch.nan if values.is_floating_point() else -1
        whole = values.new_full((*zero_mask.shape, *values.shape[1:]), empty)
        whole[zero_mask.logical_not().to(values.device)] = values
        return whole.cpu()

    def of_targets(values: Tensor) -> Tensor:
        return scatter(values) if targets.several else scatter(values.squeeze(-1))

    every = (read.top_ids.cpu(), read.bottom_ids.cpu(), options.vocab, targets.per_row)
    kept = torch.cat([x.flatten() for x in every]).unique().tolist()
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


def _for_rows(targets: Int[Tensor, "..."], rows: Sequence[int]) -> Int[Tensor, "..."]:
    """Targets that are aligned with rows from the right, one for every row."""
    if targets.ndim == len(rows) + 1 and len(targets) == 1:
        targets = targets[0]
    try:
        return targets.expand(*rows)
    except RuntimeError as error:
        raise ValueError(
            f"targets of shape {list(targets.shape)} do not fit to the rows, {list(rows)}; they "
            "are aligned from the right, and one for each prompt is [batch, 1]"
        ) from error


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


def layer_of(label: str) -> int | None:
    """The layer in a site's name or in a label such as ``3_pre``, ``3_mlp_out`` or ``L3H0``."""
    found = re.match(r"blocks\.(\d+)\.|(\d+)_|L(\d+)H", label)
    return int(next(filter(None, found.groups()))) if found else None
