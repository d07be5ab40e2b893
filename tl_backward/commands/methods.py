"""The editing methods of ``evaluate``, made from what the command line says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from inspect import signature
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from tl_backward.commands.checks import integers, number_or_auto, parts

if TYPE_CHECKING:
    from tl_backward import KeyStatistics, MendEditor
    from tl_backward.evaluation import Method, Record


class MethodName(str, Enum):
    """The methods of the command."""

    shift = "shift"
    gradient_step = "gradient-step"
    fine_tuning = "fine-tuning"
    adam = "adam"
    mend = "mend"
    rome = "rome"
    memit = "memit"
    alpha_edit = "alpha-edit"
    unedited = "unedited"


SPAN = 5
"""Layers that MEMIT and AlphaEdit edit, up to the one that is named."""
SHIFT_RIDGE, PUBLISHED_RIDGE = 0.01, 0
SEARCH_VALUES = (MethodName.rome, MethodName.memit, MethodName.alpha_edit)
SPREAD = (MethodName.memit, MethodName.alpha_edit)
NEED_A_STEP = (MethodName.gradient_step, MethodName.fine_tuning)
HAVE_AN_OPTION = {
    *("cache", "contexts", "earlier", "iterations", "key", "layer", "layers", "lr"),
    *("model", "null_space", "position", "prepend_bos", "prompt", "prompts", "records"),
    *("statistics", "subject", "subjects", "target", "targets", "texts", "tokens"),
}
"""Arguments of editors that follow from other options, or from the records."""

Grid: TypeAlias = dict[str, list[Any]]
"""By name of a setting, the values to choose from."""


@dataclass(frozen=True)
class Needs:
    """What methods are made from.

    Attributes:
        model: The model.
        prepend_bos: Whether texts begin with a BOS token.
        statistics: Of all layers that come into question; None without ``--whiten``.
        n_contexts: How many of the contexts count; None for all.
    """

    model: Any
    prepend_bos: bool
    statistics: KeyStatistics | None
    n_contexts: int | None


def edited_layers(method: MethodName, layer: int) -> list[int]:
    """The layers whose W_out an edit changes for one ``--layer``."""
    if method not in SPREAD:
        return [layer]
    if layer < 0:
        raise ValueError(f"--layer {layer}: for {method.value} count layers from 0")
    return list(range(max(0, layer - SPAN + 1), layer + 1))


def parsed_grid(method: MethodName, layer: str | None, lr: str, others: Iterable[str]) -> Grid:
    """What ``--layer``, ``--lr`` and each ``--set`` leave to choose from.

    Raises:
        ValueError: When one is malformed or missing, or the method has no such setting.
    """
    if method is MethodName.unedited:
        return {}
    grid: Grid = {}
    if method is MethodName.mend:
        grid |= {} if layer is None else {"layers": [integers(layer, "--layer")]}
    elif layer is None:
        raise ValueError("--layer is missing; pass the layer of W_out to edit")
    else:
        grid["layer"] = integers(layer, "--layer")
    grid["lr"] = [number_or_auto(part, "--lr", float) for part in parts(lr, "--lr")]
    if "auto" in grid["lr"] and method in NEED_A_STEP:
        raise ValueError(f"--lr must be a number for {method.value}")
    grid |= _settings(method, others)
    if method is MethodName.mend and len(combinations(grid)) > 1:
        raise ValueError("--lr, --set: mend is trained once; pass one value for each setting")
    return grid


def require_consistent(
    method: MethodName, whiten: str | None, contexts: int | None, editor: Path | None
) -> None:
    """Refuse options that a method does not take, and a text that is missing."""
    given = {"--whiten": whiten, "--contexts": contexts, "--editor": editor}
    takes = {
        "--whiten": (MethodName.shift, *SEARCH_VALUES),
        "--contexts": SEARCH_VALUES,
        "--editor": (MethodName.mend,),
    }
    for option, value in given.items():
        if value is not None and method not in takes[option]:
            raise ValueError(f"{option} is not for {method.value}; leave it out")
    if whiten is None and method in SPREAD:
        raise ValueError(f"--whiten is missing: {method.value} needs the keys' statistics")


def checked_layers(model: Any, method: MethodName, grid: Grid) -> list[int]:
    """All layers that may be edited.

    Raises:
        ValueError, NotImplementedError: When one has no W_out.
    """
    from tl_backward import weight_sites

    for layer in grid.get("layer", []):
        try:
            weight_sites(model, "W_out", layers=edited_layers(method, layer))
        except (NotImplementedError, ValueError) as error:
            raise type(error)(f"--layer {layer}: {error}") from error
    return sorted({one for layer in grid.get("layer", []) for one in edited_layers(method, layer)})


def named(method: MethodName, settings: Mapping[str, Any], *more: str) -> str:
    """How the table calls a method with its settings, or with those to choose from."""
    first = [f"{key} {_shown(settings[key])}" for key in ("layer", "lr") if key in settings]
    others = [f"{key} {_shown(settings[key])}" for key in settings if key not in ("layer", "lr")]
    return ", ".join([method.value, *first, *filter(None, more), *others])


def statistics_of(
    method: MethodName, model: Any, texts: Sequence[str], layers: Sequence[int], prepend_bos: bool
) -> KeyStatistics:
    """The statistics that a method whitens its keys by, with the ridge that it takes."""
    from tl_backward import key_statistics

    ridge = SHIFT_RIDGE if method is MethodName.shift else PUBLISHED_RIDGE
    return key_statistics(model, texts, layers, ridge=ridge, prepend_bos=prepend_bos)


def maker(method: MethodName, needs: Needs, tokens: str) -> Callable[..., Method]:
    """A function that makes the method from a layer, a step and other settings."""
    from tl_backward import evaluation
    from tl_backward.editing import memit_contexts, rome_contexts

    whitened: dict[str, Any] = {"statistics": needs.statistics}
    if method is MethodName.rome:
        contexts = rome_contexts(needs.model)[: needs.n_contexts]
        return lambda **given: evaluation.rome(contexts=contexts, **whitened, **_stepped(given))
    if method in SPREAD:
        (plain,), texts = memit_contexts(needs.model, needs.prepend_bos)
        texts = texts if needs.n_contexts is None else texts[: needs.n_contexts - 1]
        kinds = [[plain], texts] if texts else [[plain]]
        if method is MethodName.alpha_edit:
            whitened = {"null_space": _null_space(needs.statistics)}
        make = evaluation.memit if method is MethodName.memit else evaluation.alpha_edit
        return lambda layer, **given: make(
            layers=edited_layers(method, layer), contexts=kinds, **whitened, **_stepped(given)
        )
    if method is MethodName.adam:
        return lambda **given: evaluation.adam(**_stepped(given))
    if method is MethodName.gradient_step:
        return lambda layer, **given: evaluation.gradient(layers=layer, **given)
    if method is MethodName.fine_tuning:
        return lambda layer, **given: evaluation.fine_tuning(layers=layer, **given)
    key = {} if needs.statistics is None else whitened | {"key": "whitened"}
    return lambda **given: evaluation.shift(tokens=tokens, **key, **given)


def combinations(grid: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All settings of a grid."""
    return [dict(zip(grid, one, strict=True)) for one in product(*grid.values())]


def mend_editor(
    model: Any,
    records: Sequence[Record],
    file: Path | None,
    prepend_bos: bool,
    settings: Mapping[str, Any],
) -> MendEditor:
    """The editor of a file or, where there is none, one that is trained and then written there.

    Raises:
        ValueError: When there is no record to train on, and as ``MendEditor.load``.
    """
    from tl_backward import MendEditor, train_mend

    if file is not None and file.exists():
        return MendEditor.load(file, model)
    if not records:
        raise ValueError(
            "no record is left to train MEND on: it takes those behind the ones that are measured "
            "and those that --tune sets aside; pass a smaller -n, or an --editor that is trained"
        )
    editor = train_mend(model, records, prepend_bos=prepend_bos, **_stepped(settings))
    if file is not None:
        editor.save(file)
    return editor


def _settings(method: MethodName, given: Iterable[str]) -> Grid:
    """The values of each ``--set NAME=VALUE,...``."""
    known = [name for name in _arguments(method) if name not in HAVE_AN_OPTION]
    settings = {}
    for one in given:
        name, sign, text = one.partition("=")
        if not sign:
            raise ValueError(f"--set takes NAME=VALUE or NAME=VALUE,VALUE,..., got {one!r}")
        if name not in known:
            raise ValueError(
                f"--set {one}: {method.value} has no setting {name!r}; it has {', '.join(known)}"
            )
        settings[name] = [_value(part) for part in parts(text, f"--set {name}")]
    return settings


def _arguments(method: MethodName) -> list[str]:
    import tl_backward as tlb
    from tl_backward import evaluation

    editors: dict[MethodName, Callable[..., Any]] = {
        MethodName.shift: tlb.forward_pass_shift,
        MethodName.gradient_step: evaluation.gradient,
        MethodName.fine_tuning: tlb.fine_tune,
        MethodName.adam: tlb.adam_fine_tune,
        MethodName.mend: tlb.train_mend,
        MethodName.rome: tlb.rome,
        MethodName.memit: tlb.memit,
        MethodName.alpha_edit: tlb.alpha_edit,
    }
    return list(signature(editors[method]).parameters) if method in editors else []


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " or ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _stepped(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without a step that is "auto": then it is that of the published code."""
    return {key: value for key, value in given.items() if (key, value) != ("lr", "auto")}


def _null_space(statistics: KeyStatistics | None) -> dict[str, Any]:
    from tl_backward.editing.alpha_edit import FRACTION

    assert statistics is not None
    names = statistics.second_moments
    return {name: statistics.null_space(name, fraction=FRACTION) for name in names}
