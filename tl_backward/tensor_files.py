"""Safetensors files that say what they hold: tensors by name, and all the rest as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = "1"


def write(path: Path, kind: str, tensors: Mapping[str, Tensor], contents: Any) -> Path:
    """Write tensors and contents; the file appears under its name only when it is whole.

    Args:
        path: The file. Its folder must exist.
        kind: The class that is saved, which :func:`read` asks for.
        tensors: By name.
        contents: Anything that JSON takes.

    Raises:
        FileNotFoundError: When there is no such folder.
        OSError: When the file cannot be written.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} into")
    metadata = {
        "format": f"tl_backward.{kind}",
        "version": VERSION,
        "contents": json.dumps(contents),
    }
    stored = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    with TemporaryDirectory(prefix=".tl_backward-", dir=path.parent) as folder:
        whole = Path(folder, path.name)
        try:
            save_file(stored, whole, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        os.replace(whole, path)
    return path


def read(path: Path, kind: str) -> tuple[Any, dict[str, Tensor]]:
    """The contents and the tensors, in memory of their own, that :func:`write` has written.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it is truncated or damaged, holds something else or is of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, file.keys()
            if metadata.get("format") != f"tl_backward.{kind}":
                raise ValueError(
                    f"{path} is a safetensors file, but holds no {kind}; pass a file that "
                    f"{kind}.save has written"
                )
            if metadata.get("version") != VERSION:
                raise ValueError(
                    f"{path} is in version {metadata.get('version')} of its format, and this "
                    f"tl_backward reads version {VERSION}; upgrade tl_backward, or save the {kind} "
                    "again with this one"
                )
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path} is truncated, damaged, or no safetensors file ({error}); save the {kind} "
            f"again, or pass a file that {kind}.save has written"
        ) from error
    try:
        return json.loads(metadata.get("contents", "")), tensors
    except json.JSONDecodeError as error:
        raise damaged(path, kind, error) from error


def damaged(path: Path, kind: str, error: Exception) -> ValueError:
    """The error of a file whose contents do not fit together."""
    return ValueError(f"{path} is a damaged {kind} ({error!r}); save the {kind} again")
