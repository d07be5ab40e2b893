"""Validated readout options of the lens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypedDict

from jaxtyping import Int
from torch import Tensor
from typing_extensions import Unpack

from tl_backward._integers import is_integer
from tl_backward.capture.tokens import each_token_id
from tl_backward.lens._targets import TargetTokens
from tl_backward.lens._vocabulary import ReturnType
from tl_backward.lens.readout import VALUE_COLUMNS
from tl_backward.sites import Model
from tl_backward.translators import Translator

TOP_K = 10
VocabularyTokens: TypeAlias = str | int | Sequence[str | int] | Int[Tensor, "v"]


class ReadoutKeywords(TypedDict, total=False):
    """The readout arguments of :meth:`BackwardLogitLens.__call__`."""

    lens: Translator | None
    apply_ln: bool
    normalize: bool
    vocab: VocabularyTokens | None
    return_type: ReturnType
    top_k: int | None
    bottom_k: int | None
    direction: Literal["gradient", "descent"]
    chunk_size: int


class ReadKeywords(ReadoutKeywords, total=False):
    """The arguments of :meth:`BackwardLogitLens.read`."""

    targets: TargetTokens | None


@dataclass(frozen=True)
class ReadoutOptions:
    """Validated :class:`ReadoutKeywords`, with their defaults."""

    lens: Translator | None
    apply_ln: bool
    normalize: bool
    vocab: Int[Tensor, "v"]
    return_type: ReturnType
    top_k: int
    bottom_k: int
    direction: Literal["gradient", "descent"]
    chunk_size: int


def readout_options(model: Model, **given: Unpack[ReadoutKeywords]) -> ReadoutOptions:
    """Validate the readout arguments of :meth:`BackwardLogitLens.__call__` and fill in defaults.

    Raises:
        TypeError: If ``lens`` is not callable, or ``vocab`` does not hold tokens.
        ValueError: If an option is out of range, or two exclude each other.
    """
    vocab, lens = given.get("vocab"), given.get("lens")
    top_k, bottom_k = _ends(model, vocab, given.get("top_k"), given.get("bottom_k"))
    ids = each_token_id(model, "vocab", [] if vocab is None else vocab)
    if ids.ndim > 1 or (vocab is not None and not ids.numel()):
        raise ValueError(f"vocab must be one token or a flat list of tokens, got {vocab!r}")
    chunk_size = given.get("chunk_size", 64)
    if not is_integer(chunk_size) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer of at least 1, got {chunk_size!r}")
    if lens is not None and not callable(lens):
        raise TypeError(
            f"lens must be a function f(vectors, layer) -> vectors, got {lens!r}; for a "
            "JacobianLens, pass tl_backward.translators.through_jacobian_lens(jacobian_lens)"
        )
    return_type = given.get("return_type", "log_probs")
    if return_type not in VALUE_COLUMNS:
        raise ValueError(
            f"return_type must be 'logits', 'log_probs' or 'probs', got {return_type!r}"
        )
    direction = given.get("direction", "gradient")
    if direction not in ("gradient", "descent"):
        raise ValueError(f"direction must be 'gradient' or 'descent', got {direction!r}")
    return ReadoutOptions(
        lens=lens,
        apply_ln=given.get("apply_ln", True),
        normalize=given.get("normalize", False),
        vocab=ids.reshape(-1),
        return_type=return_type,
        top_k=top_k,
        bottom_k=bottom_k,
        direction=direction,
        chunk_size=chunk_size,
    )


def _ends(
    model: Model, vocab: VocabularyTokens | None, top_k: int | None, bottom_k: int | None
) -> tuple[int, int]:
    """The number of tokens to keep at the top and at the bottom."""
    if vocab is not None and (top_k is not None or bottom_k is not None):
        raise ValueError("pass vocab, or top_k and bottom_k, not both")
    d_vocab = int(model.cfg.d_vocab)
    top = (TOP_K if vocab is None else 0) if top_k is None else top_k
    bottom = top if bottom_k is None else bottom_k
    for name, k, least in (("top_k", top, int(top_k is not None)), ("bottom_k", bottom, 0)):
        if not is_integer(k) or not least <= k <= d_vocab:
            raise ValueError(
                f"{name} must be an integer in [{least}, {d_vocab}] (d_vocab), got {k!r}"
            )
    return top, bottom
