"""Removing padding from token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_backward._user_warnings import warn_user

Rows = list[Int[Tensor, "_"]]
SPECIAL_TOKENS = ("bos", "eos", "unk", "cls", "sep", "mask")


def unpadded(
    tokenizer: Any, tokens: Int[Tensor, "batch pos"], side: str, begins_with_bos: bool
) -> Rows:
    """The rows of a tensor without their padding.

    A dedicated pad token is padding at both ends of a row. A pad token with another role, as in
    GPT-2, where it is also BOS and EOS, is padding on the given side only. There, all pad tokens
    are removed, except:

    - one in every row, if rows begin with BOS and BOS is the pad token;
    - the innermost one of a row that holds nothing else: a text has at least one token.

    Args:
        tokenizer: Provides the pad token; without one there is no padding.
        tokens: The rows.
        side: The padded side, ``"left"`` or ``"right"``.
        begins_with_bos: Whether each row begins with BOS.

    Warns:
        UserWarning: If pad tokens at an end of a row might be text, saying how they were read.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None or not tokens.numel():
        return list(tokens)
    is_text = tokens.ne(pad)
    leading, trailing = (_run(is_text), _run(is_text.flip(1)))
    if is_only_padding(tokenizer):
        return _cut(tokens, leading, trailing)
    n = tokens.shape[1]
    at_padding, elsewhere = (leading, trailing) if side == "left" else (trailing, leading)
    own = int(side == "left" and begins_with_bos and pad == tokenizer.bos_token_id)
    cut = (at_padding - min(own, int(at_padding.min()))).clamp(max=n - 1)
    _warn_of_ambiguity(tokenizer, side, cut, at_padding, elsewhere, n)
    none = torch.zeros_like(cut)
    return _cut(tokens, *((cut, none) if side == "left" else (none, cut)))


def is_only_padding(tokenizer: Any) -> bool:
    """Whether the tokenizer has a dedicated pad token."""
    pad = getattr(tokenizer, "pad_token_id", None)
    others = [getattr(tokenizer, f"{role}_token_id", None) for role in SPECIAL_TOKENS]
    return pad is not None and pad not in others


def encoded_rows(encoding: Mapping[str, Any]) -> list[Any]:
    """The token ids of a tokenizer's output where its ``attention_mask`` is 1.

    Returns:
        A list of rows for a nested list or a tensor of several rows, otherwise one row.

    Raises:
        TypeError: If there are no ``input_ids``.
        ValueError: If the mask is missing, has another shape, or is not a single run of ones.
        NotImplementedError: For nonzero token types, which the model does not receive.
    """
    if "input_ids" not in encoding:
        raise TypeError(
            "prompt is a mapping without input_ids; pass the tokenizer's output, text or token "
            f"ids, got the keys {', '.join(map(str, encoding))}"
        )
    if "attention_mask" not in encoding:
        raise ValueError(
            "prompt has input_ids but no attention_mask to mark padding; pass the tokenizer's "
            "whole output, or the input_ids alone"
        )
    if any(map(_any_nonzero, _nested(encoding.get("token_type_ids", [])))):
        raise NotImplementedError(
            "prompt has nonzero token_type_ids, but the model runs without token types; pass the "
            "input_ids alone"
        )
    ids, mask = _nested(encoding["input_ids"]), _nested(encoding["attention_mask"])
    if not ids or not isinstance(ids[0], list):
        return _text(ids, mask, "")
    if len(ids) != len(mask):
        raise ValueError(f"attention_mask has {len(mask)} rows, but input_ids has {len(ids)}")
    rows = [
        _text(of_row, mask_of_row, f" of row {b}")
        for b, (of_row, mask_of_row) in enumerate(zip(ids, mask, strict=True))
    ]
    return rows[0] if len(rows) == 1 and not isinstance(encoding["input_ids"], list) else rows


def _run(is_text: Tensor) -> Int[Tensor, "batch"]:
    """Number of pad tokens before the first text token of each row."""
    return is_text.long().cummax(1).values.eq(0).sum(1)


def _cut(tokens: Tensor, leading: Tensor, trailing: Tensor) -> Rows:
    ends = (tokens.shape[1] - trailing).tolist()
    return [row[start:end] for row, start, end in zip(tokens, leading.tolist(), ends, strict=True)]


def _warn_of_ambiguity(
    tokenizer: Any, side: str, cut: Tensor, at_padding: Tensor, elsewhere: Tensor, n: int
) -> None:
    other = "right" if side == "left" else "left"
    pad = tokenizer.pad_token_id
    at_other = tokenizer.bos_token_id if other == "left" else tokenizer.eos_token_id
    expected = int(pad == at_other)
    begins = at_padding.gt(cut) & at_padding.lt(n)
    taken = [
        (cut.gt(0) & ~begins, side, "padding"),
        (cut.gt(0) & begins, side, "padding, except one as BOS"),
        (cut.eq(0) & begins, side, "text"),
        (cut.eq(0) & elsewhere.gt(expected), other, "text"),
    ]
    parts = [
        f"{tokenizer.pad_token!r} at the {'beginning' if where == 'left' else 'end'} of row "
        f"{', '.join(str(b) for b in rows.nonzero().flatten().tolist())} is treated as {role}"
        for rows, where, role in taken
        if rows.any()
    ]
    if parts:
        warn_user(
            f"prompt: {'; '.join(parts)}. This token can be padding or text, and padding_side is "
            f"{side!r}: pass the tokenizer's whole output with its attention_mask, or, if all of "
            "it is text, a list of rows"
        )


def _nested(value: Any) -> list[Any]:
    """Convert a tokenizer's container to a list or a list of lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_nested(one) if isinstance(one, Iterable) else one for one in value]


def _any_nonzero(value: Any) -> bool:
    return any(value) if isinstance(value, list) else bool(value)


def _text(ids: list[Any], mask: list[Any], which: str) -> list[Any]:
    if len(ids) != len(mask) or any(one not in (0, 1) for one in mask):
        raise ValueError(f"attention_mask{which} must hold a 0 or 1 for each of input_ids")
    text = [one for one, is_text in zip(ids, mask, strict=True) if is_text]
    start = mask.index(1) if text else 0
    if any(is_text == 0 for is_text in mask[start : start + len(text)]):
        raise ValueError(f"attention_mask{which} has a gap; a text is one run of tokens")
    return text
