"""Weights that ``accelerate`` keeps elsewhere between the calls of their modules.

A module has a placeholder on the ``meta`` device then, which is replaced at every call. What can be
written to is the tensor that ``accelerate`` reads: the one on the CPU, or the file on disk.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_files: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()
"""By module and name, the weights in files, each as one tensor."""


def stored(module: nn.Module, name: str) -> Tensor:
    """The tensor ``module.name``, where it is kept if it is offloaded.

    A change of it in place is in effect from the next forward pass. What is kept where nothing can
    be written, in a checkpoint, is on the ``meta`` device.
    """
    tensor = getattr(module, name)
    hook = _offloading_hook(module) if tensor.device.type == "meta" else None
    return tensor if hook is None else _kept(hook.weights_map, name, module, tensor)


@contextmanager
def values_of(module: nn.Module) -> Iterator[None]:
    """A module with its weights in place, on the device where it computes."""
    hook = _offloading_hook(module)
    if hook is None:
        yield
        return
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def _offloading_hook(module: nn.Module) -> Any:
    """The hook of ``accelerate`` that fetches the weights of a module; None if there is none."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((one for one in hooks if getattr(one, "offload", False)), None)


def _kept(weights: Any, name: str, module: nn.Module, placeholder: Tensor) -> Tensor:
    key = name
    while hasattr(weights, "prefix"):
        weights, key = weights.dataset, weights.prefix + key
    in_memory = getattr(weights, "state_dict", weights)
    if key in in_memory:
        return in_memory[key]
    entry = weights.index[key]
    if entry.get("safetensors_file") is not None:
        return placeholder
    files = _files.setdefault(module, {})
    if name not in files:
        files[name] = _in_file(Path(weights.save_folder) / f"{key}.dat", entry)
    return files[name]


def _in_file(path: Path, entry: Mapping[str, Any]) -> Tensor:
    """The tensor in a file of ``accelerate``, written through to it."""
    dtype = getattr(torch, entry["dtype"])
    as_stored = {1: "int8", 2: "int16"}.get(dtype.itemsize, entry["dtype"])
    array = np.memmap(path, dtype=as_stored, shape=tuple(entry["shape"]), mode="r+")
    return torch.from_numpy(array).view(dtype)
