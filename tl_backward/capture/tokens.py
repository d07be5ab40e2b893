"""Converting prompts and targets to token ids."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any, Literal, TypeAlias, TypeGuard

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_backward._integers import is_integer
from tl_backward._user_warnings import warn_user
from tl_backward.capture._unpadding import encoded_rows, is_only_padding, unpadded

Prompt: TypeAlias = str | Tensor | np.ndarray | Sequence[Any] | Mapping[str, Any]
Target: TypeAlias = str | int | Tensor | Sequence[Any]
Bytes = bytes | bytearray | memoryview

CLOSING = tuple(".,;:!?)]}%»\u2019\u201d")
"""Characters after which the next word begins with a space."""


def is_single(prompt: Prompt) -> bool:
    """Whether this is one prompt: text, a list of ids, or a tensor of ids with at most one row."""
    if isinstance(prompt, Mapping):
        return _is_ids(encoded_rows(prompt))
    if isinstance(prompt, Tensor) or _is_array_of_ids(prompt):
        return prompt.ndim < 2 or len(prompt) == 1
    return isinstance(prompt, str) or _is_ids(prompt)


def prompt_tokens(
    model: Any, prompt: Prompt, prepend_bos: bool | None, padding_side: str | None = None
) -> list[Int[Tensor, "pos"]]:
    """The tokens of every prompt, without padding, on the CPU.

    Args:
        model: Any TransformerLens model; its tokenizer and vocabulary are used.
        prompt: Text or token ids of one prompt, or a list of several. A tensor or an array may be
            padded with the tokenizer's pad token, see ``_unpadding.unpadded``; lists are taken as
            they are. A tokenizer's output is read by its ``attention_mask``.
        prepend_bos: As in ``model.to_tokens``; token ids are taken as they are. For a tensor padded
            with BOS on the left, says whether each row also begins with BOS.
        padding_side: Side on which the rows of a tensor are padded. Default: the tokenizer's
            setting.

    Raises:
        TypeError: If a prompt is neither a string nor integer token ids.
        ValueError: If a prompt is empty or outside the vocabulary, or an ``attention_mask`` is
            malformed.

    Warns:
        UserWarning: If pad tokens might be text.
    """
    single = is_single(prompt)
    where = [""] if single else (f" (example {b})" for b in count())
    if isinstance(prompt, Mapping):
        rows: Any = encoded_rows(prompt)
        rows = [rows] if single else rows
    elif isinstance(prompt, Tensor) or _is_array_of_ids(prompt):
        tokens = prompt if isinstance(prompt, Tensor) else torch.from_numpy(prompt.astype("int64"))
        side = padding_side_of(model, padding_side)
        rows = _rows_of_tensor(model, tokens, prepend_bos, side)
    else:
        rows = [prompt] if single else _as_list(prompt, "prompt")
        _warn_of_pads(model, rows)
    if not len(rows):
        raise ValueError("prompt is an empty list; pass at least one prompt")
    return [
        _one_prompt(model, row, prepend_bos, which) for row, which in zip(rows, where, strict=False)
    ]


def target_tokens(
    model: Any,
    target: Target,
    n_prompts: int | None,
    argument: str = "target",
    after: Sequence[Int[Tensor, "_"]] | None = None,
) -> list[list[int]]:
    """The token ids of the target of every prompt.

    Args:
        model: Any TransformerLens model; its tokenizer and vocabulary size are used.
        target: For one prompt: a string, an id, or a list or vector of ids. For several: one of
            these for all prompts, or a list (or a tensor) with one per prompt.
        n_prompts: Number of prompts, or None for a single one.
        argument: Name of the argument in errors.
        after: Tokens of the prompts that precede the targets, to detect a missing leading space.
            Default: unknown.

    Raises:
        TypeError: If a target is neither a string nor integer token ids.
        ValueError: If a target is empty or outside the vocabulary, or their number is wrong.

    Warns:
        UserWarning: If a string of several tokens would be one token with a leading space; or, with
            known prompts, if its one token looks like a word whose usual token has the space. No
            warning after a prompt whose end joins the next word, such as a space, a dash or an
            opening bracket.
    """
    one_for_all = isinstance(target, str) or is_integer(target)
    one_for_all = one_for_all or (isinstance(target, Tensor) and not target.ndim)
    if one_for_all or (n_prompts is None and _is_ids(target)):
        each = [target] * (n_prompts or 1)
    else:
        each = _as_list(target, argument)
    if len(each) != (n_prompts or 1):
        prompts = "one prompt" if n_prompts in (None, 1) else f"{n_prompts} prompts"
        raise ValueError(f"{argument} holds {len(each)} targets for {prompts}")
    targets, hints = [], defaultdict[str, list[str]](list)
    for b, one in enumerate(each):
        which = "" if n_prompts is None else f" (example {b})"
        ids = _ids(model, one, argument, which)
        hint = _hint_at_space(model, argument, one, ids, None if after is None else after[b])
        if hint is not None:
            hints[hint].append(str(b))
        targets.append(ids)
    for hint, examples in hints.items():
        which = "" if n_prompts is None else f" (example {', '.join(examples)})"
        warn_user(hint + which)
    return targets


def single_token_ids(
    model: Any,
    argument: str,
    target: Target,
    n_prompts: int | None,
    after: Sequence[Int[Tensor, "_"]] | None = None,
) -> Int[Tensor, "batch"]:
    """One token id for every prompt, as :func:`target_tokens` takes them.

    Raises:
        TypeError, ValueError: As :func:`target_tokens`, and if a target is not exactly one token.
    """
    every = target_tokens(model, target, n_prompts, argument, after)
    for ids in every:
        if len(ids) != 1:
            raise ValueError(_not_one_token(model, argument, target, ids))
    return torch.tensor(every).squeeze(1)


def each_token_id(model: Any, argument: str, tokens: Any) -> Int[Tensor, "..."]:
    """Token ids: a scalar for a string or an id, a vector for several, a tensor unchanged.

    Raises:
        TypeError, ValueError: As :func:`single_token_ids`.
    """
    if isinstance(tokens, str) or is_integer(tokens):
        return single_token_ids(model, argument, tokens, None)[0]
    if isinstance(tokens, Tensor):
        if tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise TypeError(f"{argument} must hold integer token ids, got {tokens.dtype}")
        ids = tokens.long().cpu()
    elif _is_ids(tokens):
        ids = torch.tensor([int(i) for i in tokens], dtype=torch.long)
    else:
        each = _as_list(tokens, argument)
        return torch.cat([single_token_ids(model, argument, one, None) for one in each])
    if ids.numel():
        _require_in_vocabulary(model, ids.aminmax(), argument, "")
    return ids


def padding_side_of(model: Any, padding_side: str | None) -> Literal["left", "right"]:
    """The given padding side, by default the tokenizer's.

    Raises:
        ValueError: If it is neither left nor right.
    """
    side = padding_side or getattr(model.tokenizer, "padding_side", "right")
    if side == "left":
        return "left"
    if side == "right":
        return "right"
    raise ValueError(f"padding_side must be 'left' or 'right', got {side!r}")


def decode_each(model: Any, ids: Iterable[int]) -> list[str]:
    """Decode every token by itself; without a tokenizer, return its id as a string."""
    ids = list(ids)
    if model.tokenizer is None or not ids:
        return [str(i) for i in ids]
    return model.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)


def _rows_of_tensor(
    model: Any, tokens: Tensor, prepend_bos: bool | None, side: str
) -> Sequence[Tensor]:
    """The rows without padding. A malformed tensor is left to the per-row checks."""
    if _is_not_ids(tokens) or tokens.ndim > 2:
        return list(tokens) if tokens.ndim > 1 else [tokens]
    if prepend_bos is None:
        prepend_bos = getattr(model.cfg, "default_prepend_bos", True)
    return unpadded(model.tokenizer, torch.atleast_2d(tokens).cpu(), side, prepend_bos)


def _warn_of_pads(model: Any, rows: Sequence[Any]) -> None:
    """Warn about dedicated pad tokens in lists, which are unlikely to be text."""
    if not is_only_padding(model.tokenizer):
        return
    pad = model.tokenizer.pad_token_id
    padded_rows = [
        str(b)
        for b, row in enumerate(rows)
        if not isinstance(row, str) and _is_ids(row) and len(row) and pad in (row[0], row[-1])
    ]
    if padded_rows:
        warn_user(
            f"prompt: the pad token {model.tokenizer.pad_token!r} at an end of row "
            f"{', '.join(padded_rows)} is treated as text, because rows of a list are not padded; "
            "pass a tensor, or the tokenizer's whole output"
        )


def _one_prompt(
    model: Any, prompt: Any, prepend_bos: bool | None, which: str
) -> Int[Tensor, "pos"]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"prompt is empty{which}; pass at least one token of text")
        _require_tokenizer(model, "prompt")
        ids = model.to_tokens(prompt, prepend_bos=prepend_bos, truncate=False)[0].tolist()
        _require_in_vocabulary(model, ids, "prompt", which)
    else:
        ids = _ids(model, prompt, "prompt", which)
    return torch.tensor(ids)


def _ids(model: Any, value: Any, argument: str, which: str) -> list[int]:
    """The token ids of a string, an id, or a list or vector of ids."""
    ids: list[int] | None
    if isinstance(value, str):
        _require_tokenizer(model, argument)
        ids = _encode(model, value)
    elif isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool:
        ids = value.flatten().tolist() if value.ndim < 2 or len(value) == 1 else None
    elif is_integer(value):
        ids = [int(value)]
    else:
        ids = [int(i) for i in value] if _is_ids(value) else None
    if ids is None:
        raise TypeError(f"{argument} must be a string or token ids{which}, got {value!r}")
    if not ids:
        raise ValueError(f"{argument} is empty{which}; pass at least one token")
    _require_in_vocabulary(model, ids, argument, which)
    return ids


def _require_in_vocabulary(model: Any, ids: Sequence[Any], argument: str, which: str) -> None:
    if min(ids) < 0 or max(ids) >= model.cfg.d_vocab:
        raise ValueError(
            f"{argument} holds token ids outside the vocabulary{which}: "
            f"this model has token ids 0 to {model.cfg.d_vocab - 1}"
        )


def _is_ids(value: Any) -> bool:
    """Whether this is a vector or a plain sequence of integers."""
    if isinstance(value, Tensor):
        return value.ndim < 2 and not value.is_floating_point()
    if isinstance(value, Bytes):
        return False
    return isinstance(value, Sequence | np.ndarray) and all(map(is_integer, value))


def _is_array_of_ids(value: Any) -> TypeGuard[np.ndarray]:
    return isinstance(value, np.ndarray) and value.dtype.kind in "iu"


def _is_not_ids(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.dtype == torch.bool


def _as_list(value: Any, argument: str) -> list[Any]:
    if not isinstance(value, Iterable) or isinstance(
        value, bytes | bytearray | memoryview | Mapping
    ):
        raise TypeError(f"{argument} must be a string, token ids, or a list of them, got {value!r}")
    return list(value)


def _require_tokenizer(model: Any, argument: str) -> None:
    if model.tokenizer is None:
        raise ValueError(f"this model has no tokenizer; pass {argument} as token ids")


def _encode(model: Any, string: str) -> list[int]:
    return model.to_tokens(string, prepend_bos=False)[0].tolist() if string else []


def _not_one_token(model: Any, argument: str, target: Any, ids: list[int]) -> str:
    tokens = decode_each(model, ids)
    return (
        f"{argument}={target!r} must be exactly one token, but it is {len(ids)}: {tokens}. "
        "Pass a word that the tokenizer encodes as one token, usually with a leading space."
    )


def _hint_at_space(
    model: Any, argument: str, target: Any, ids: list[int], prompt: Int[Tensor, "_"] | None
) -> str | None:
    """A hint for a target that seems to lack its leading space, or None.

    A one-token target without a space may be a suffix of the prompt's last word or a word of its
    own. A capital letter marks a word; otherwise the token ids decide, because more frequent merges
    have smaller ids: ``" the"`` has a smaller id than ``"the"``, but ``"ing"`` a smaller one than
    ``" ing"``.
    """
    if not isinstance(target, str) or target != target.lstrip():
        return None
    spaced = _encode(model, f" {target}")
    last = None if prompt is None else decode_each(model, prompt[-1:].tolist())[0][-1:]
    if len(spaced) != 1 or spaced == ids or (last is not None and _joins(last)):
        return None
    if len(ids) > 1:
        return (
            f"{argument}={target!r} is {len(ids)} tokens, {decode_each(model, ids)}; with the "
            f"leading space, {' ' + target!r} is one token"
        )
    begins = last is not None and target[0].isupper() and not last.isupper()
    if not begins and (last is None or not target[0].isalpha() or spaced > ids):
        return None
    return (
        f"{argument}={target!r} has no leading space and continues the prompt's last word; "
        f"{' ' + target!r} is also one token, and the word's usual one"
    )


def _joins(last: str) -> bool:
    """Whether the next word follows this character without a space."""
    return not last or (last not in CLOSING and unicodedata.category(last)[0] not in "LN")
