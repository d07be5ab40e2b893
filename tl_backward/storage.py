"""A ``BackwardCache`` as one safetensors file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tl_backward import tensor_files
from tl_backward.cache import BackwardCache
from tl_backward.factors import GradientFactors
from tl_backward.residual import Residual

KIND = "BackwardCache"
BY_NAME, BY_LAYER = ("vjps", "activations"), ("attention", "heads")
"""The tensors of a ``Residual``, by the name of a HookPoint and by layer."""
ON_CPU = ("tokens", "positions", "target_ids", "target_positions")


def save_cache(cache: BackwardCache, path: Path) -> Path:
    """See :meth:`BackwardCache.save`."""
    stored: dict[str, Tensor] = {}
    names: dict[tuple[object, ...], str] = {}

    def store(tensor: Tensor, name: str) -> str:
        """Add the tensor unless it is there already; the name that it has in the file."""
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in names:
            names[place] = name
            stored[name] = tensor
        return names[place]

    residual = cache.residual
    contents: dict[str, Any] = {
        "factors": {
            site: {
                "inputs": store(g.inputs, f"{site}.inputs"),
                "vjps": store(g.vjps, f"{site}.vjps"),
                "lengths": g.lengths,
            }
            for site, g in cache.factors.items()
        },
        "behind_norms": {
            site: store(vjps, f"{site}.behind_norm") for site, vjps in cache.behind_norms.items()
        },
        "residual": {
            "n_layers": residual.n_layers,
            "n_heads": residual.n_heads,
            "lengths": residual.lengths,
            **{
                kind: {key: store(t, f"residual.{kind}.{key}") for key, t in tensors.items()}
                for kind, tensors in _tensors(residual).items()
            },
        },
        **{name: _each(getattr(cache, name), store, name) for name in ON_CPU},
        "loss": store(cache.loss, "loss"),
        "str_tokens": _each(cache.str_tokens, lambda token, name: _escape(token), "str_tokens"),
        "weights_processing": cache.weights_processing,
    }
    return tensor_files.write(path, KIND, stored, contents)


def load_cache(path: Path, device: str | torch.device) -> BackwardCache:
    """See :meth:`BackwardCache.load`."""
    contents, stored = tensor_files.read(path, KIND)
    used: dict[tuple[str, bool], Tensor] = {}

    def fetch(name: str, on_cpu: bool = False) -> Tensor:
        """A tensor of the file, on its device; asked for twice, it is shared."""
        if name not in stored:
            raise ValueError(f"missing tensors: {[name]}")
        if (name, on_cpu) not in used:
            used[name, on_cpu] = stored[name] if on_cpu else stored[name].to(device)
        return used[name, on_cpu]

    try:
        residual = contents["residual"]
        cache = BackwardCache(
            factors={
                site: GradientFactors(fetch(g["inputs"]), fetch(g["vjps"]), _tuple(g["lengths"]))
                for site, g in contents["factors"].items()
            },
            behind_norms={site: fetch(name) for site, name in contents["behind_norms"].items()},
            residual=Residual(
                residual["n_layers"],
                residual["n_heads"],
                _tuple(residual["lengths"]),
                *({key: fetch(name) for key, name in residual[kind].items()} for kind in BY_NAME),
                *(
                    {int(key): fetch(name) for key, name in residual[kind].items()}
                    for kind in BY_LAYER
                ),
            ),
            **{
                field: _each(contents[field], lambda name, _: fetch(name, on_cpu=True), field)
                for field in ON_CPU
            },
            loss=fetch(contents["loss"]),
            str_tokens=_each(contents["str_tokens"], lambda token, _: _unescape(token), ""),
            weights_processing=contents["weights_processing"],
        )
        unknown = sorted(stored.keys() - {name for name, _ in used})
        if unknown:
            raise ValueError(f"unknown tensors: {unknown}")
        return cache
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise tensor_files.damaged(path, KIND, error) from error


def _tensors(residual: Residual) -> dict[str, dict[Any, Tensor]]:
    return {kind: getattr(residual, kind) for kind in (*BY_NAME, *BY_LAYER)}


def _each(value: Any, convert: Callable[[Any, str], Any], name: str) -> Any:
    """``convert`` of a value, or of every value in a list, and of every one in these."""
    if isinstance(value, list):
        return [_each(one, convert, f"{name}.{i}") for i, one in enumerate(value)]
    return convert(value, name)


def _tuple(lengths: list[int] | None) -> tuple[int, ...] | None:
    return None if lengths is None else tuple(lengths)


def _escape(text: str) -> str:
    """Text with Python's escapes: JSON alone would join two surrogates into one character."""
    return text.encode("unicode_escape").decode("ascii")


def _unescape(text: str) -> str:
    return text.encode("ascii").decode("unicode_escape")
