"""Safetensors files that hold any nested tree of tensors and plain values.

Each tensor is stored under its path in the tree; a tensor that occurs several times is stored once
and shared again when read. The rest of the tree is JSON in the file's metadata.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = "2"


def write(path: Path, kind: str, tree: Any) -> Path:
    """Write a tree atomically: a failed write leaves no partial file.

    Args:
        path: The file. Its folder must exist.
        kind: Name of the saved class; :func:`read` checks it.
        tree: Dicts, lists and tuples of tensors, strings, numbers, booleans and None. Keys are
            strings or integers.

    Raises:
        FileNotFoundError: If the folder does not exist.
        OSError: If the file cannot be written, or is not an ordinary file (e.g. a device).
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not an ordinary file; pass another name")
    tensors: dict[str, Tensor] = {}
    metadata = {
        "format": f"tl_backward.{kind}",
        "version": VERSION,
        "contents": json.dumps(_packed(tree, tensors)),
    }
    with TemporaryDirectory(prefix=".tl_backward-", dir=path.parent) as folder:
        whole = Path(folder, path.name)
        try:
            save_file(tensors, whole, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        os.replace(whole, path)
    return path


def read(path: Path, kind: str) -> Any:
    """Read a tree written by :func:`write`, with tensors in CPU memory.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated or damaged, holds another class, or has another
            version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, file.keys()
            if metadata.get("format") != f"tl_backward.{kind}":
                raise ValueError(
                    f"{path} is a safetensors file, but holds no {kind}; pass a file written by "
                    f"{kind}.save"
                )
            if metadata.get("version") != VERSION:
                raise ValueError(
                    f"{path} has format version {metadata.get('version')}, but this tl_backward "
                    f"reads version {VERSION}; upgrade tl_backward, or save the {kind} again with "
                    "this version"
                )
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated, damaged, or not a safetensors file ({error}); save the {kind} "
            f"again, or pass a file written by {kind}.save"
        ) from error
    try:
        packed = json.loads(metadata.get("contents", ""))
        _require_same_names(packed, tensors)
        return _unpacked(packed, tensors)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise damaged(path, kind, error) from error


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a tree; shared tensors stay shared."""
    made: dict[int, Tensor] = {}

    def mapped(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            if id(tree) not in made:
                made[id(tree)] = function(tree)
            return made[id(tree)]
        if isinstance(tree, dict):
            return {key: mapped(value) for key, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(map(mapped, tree))
        return tree

    return mapped(tree)


def damaged(path: Path, kind: str, error: Exception) -> ValueError:
    """The error for a file with inconsistent contents."""
    return ValueError(f"{path} is a damaged {kind} ({error!r}); save the {kind} again")


def _packed(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Convert the tree to JSON, moving its tensors into ``tensors``."""
    names: dict[tuple[object, ...], str] = {}

    def packed(tree: Any, name: str) -> Any:
        if isinstance(tree, Tensor):
            place = (tree.device, tree.data_ptr(), tree.dtype, tree.shape, tree.stride())
            if place not in names:
                names[place] = name
                tensors[name] = tree.detach().to("cpu", copy=True).contiguous()
            return {"tensor": names[place]}
        if isinstance(tree, dict):
            items = [[key, packed(value, f"{name}.{key}")] for key, value in tree.items()]
            return {"dict": items}
        if isinstance(tree, list | tuple):
            kind = "list" if isinstance(tree, list) else "tuple"
            return {kind: [packed(value, f"{name}.{i}") for i, value in enumerate(tree)]}
        return _escaped(tree) if isinstance(tree, str) else tree

    if isinstance(tree, dict):
        return {"dict": [[key, packed(value, str(key))] for key, value in tree.items()]}
    return packed(tree, "tree")


def _unpacked(packed: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(packed, str):
        return packed.encode("ascii").decode("unicode_escape")
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: _unpacked(one, tensors) for key, one in value}
    if kind in ("list", "tuple"):
        values = [_unpacked(one, tensors) for one in value]
        return values if kind == "list" else tuple(values)
    raise ValueError(f"unknown kind of node {kind!r}")


def _require_same_names(packed: Any, tensors: dict[str, Tensor]) -> None:
    """Raise unless the tree refers to exactly the tensors of the file."""
    named = set(_names(packed))
    for state, names in (("missing", named - tensors.keys()), ("unknown", tensors.keys() - named)):
        if names:
            raise ValueError(f"{state} tensors: {sorted(names)}")


def _names(packed: Any) -> list[str]:
    if not isinstance(packed, dict):
        return []
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return [value]
    each = [one for _, one in value] if kind == "dict" else value
    return [name for one in each for name in _names(one)]


def _escaped(text: str) -> str:
    """Text with Python escapes: JSON alone would merge two surrogates into one character."""
    return text.encode("unicode_escape").decode("ascii")
