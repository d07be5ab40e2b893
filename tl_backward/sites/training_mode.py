"""Detecting whether training mode changes a model's output."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

SETTING = re.compile("drop|jitter|noise")
"""Names of numbers that change a forward pass in training mode."""
NAMES_ITS_SETTINGS = ("peft", "transformer_lens", "transformers")
"""Packages in which training mode matters only if such a number is positive."""
NOT_FORWARD = ("__init__", "__init_subclass__", "eval", "train")


def training_mode_effects(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """The active effects of training mode, one description per cause.

    Effects are dropout, stochastic depth, noise, batch statistics and checkpointing. A module that
    a TransformerLens component wraps counts as being in the component's mode, because the component
    may do its computation.
    """
    places: dict[tuple[str, str], dict[str, None]] = {}
    for path, module in modules:
        if module.training:
            wrapped = module._modules.get("_original_component")
            for one in (module,) if wrapped is None else (module, wrapped):
                for cause in _causes(one):
                    place = path.replace("._original_component", "") or "the model itself"
                    places.setdefault((cause, type(one).__name__), {})[place] = None
    return [
        f"{cause} of {kind} at {next(iter(paths))}"
        + (f" (and {len(paths) - 1} more)" if len(paths) > 1 else "")
        for (cause, kind), paths in places.items()
    ]


def _causes(module: nn.Module) -> Iterator[str]:
    if isinstance(module, _DropoutNd):
        if module.p > 0:
            yield f"p={module.p}"
        return
    attributes = vars(module)
    if attributes.get("gradient_checkpointing"):
        yield "gradient_checkpointing=True"
    own = {name: v for name, v in attributes.items() if _is_positive(v) and SETTING.search(name)}
    for name, value in own.items():
        yield f"{name}={value}"
    cls: Any = type(module)
    code = _code_of(cls)
    config = getattr(module, "config", None) if code.settings else None
    for name in code.settings:
        if name not in own and _is_positive(value := getattr(config, name, None)):
            yield f"config.{name}={value}"
    if code.depends_on_mode:
        yield "self.training in the code"
    for hook in module._forward_pre_hooks.values():
        if "training" in (*_names_in(hook), *_names_in(type(hook).__call__)):
            yield f"the forward pre-hook {getattr(hook, '__name__', type(hook).__name__)}"


class _Code(NamedTuple):
    """Information on the methods of a class that read ``self.training``.

    Attributes:
        settings: The settings that these methods also use.
        depends_on_mode: Whether one of them uses no setting, so that only the mode matters.
    """

    settings: tuple[str, ...]
    depends_on_mode: bool


@cache
def _code_of(cls: Any) -> _Code:
    settings: dict[str, None] = {}
    depends_on_mode = False
    for parent in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, method in vars(parent).items():
            names = [] if name in NOT_FORWARD else _names_in(method)
            if "training" in names:
                beside = [one for one in names if SETTING.search(one)]
                settings |= dict.fromkeys(beside)
                by_mode = parent.__module__.partition(".")[0] not in NAMES_ITS_SETTINGS
                depends_on_mode |= by_mode and not beside
    return _Code(tuple(settings), depends_on_mode)


def _names_in(function: Any) -> list[str]:
    """The names used by a function and the functions it wraps or defines."""
    names: list[str] = []
    waiting = [function]
    while waiting:
        one = waiting.pop()
        code = one if isinstance(one, CodeType) else getattr(one, "__code__", None)
        if code is not None:
            names += code.co_names
            waiting += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
        waiting += [
            getattr(one, wrapper) for wrapper in ("__wrapped__", "fget") if hasattr(one, wrapper)
        ]
    return names


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and value is not True and bool(value > 0)
