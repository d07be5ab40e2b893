"""Argument checks that run before anything is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


def require_texts(**texts: str) -> None:
    """Refuse empty texts, naming the argument."""
    for name, text in texts.items():
        if not text:
            raise ValueError(f"{name} is empty; pass at least one token of text")


def require_writable(**files: Path | None) -> None:
    """Refuse files that cannot be written or are given twice, naming the option."""
    options: dict[Path, str] = {}
    for name, file in files.items():
        if file is None:
            continue
        option = f"--{name}"
        if file.is_dir():
            raise IsADirectoryError(f"{option}: {str(file)!r} is a folder; name a file")
        if not file.absolute().parent.is_dir():
            raise FileNotFoundError(f"{option}: No such file or directory: {str(file.parent)!r}")
        if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            raise PermissionError(f"{option}: {str(file)!r} cannot be written")
        other = options.setdefault(file.resolve(), option)
        if other != option:
            raise ValueError(f"{other} and {option} are the same file, {str(file)!r}")


def require_replaceable(**files: Path | None) -> None:
    """Refuse devices and pipes, because writing replaces the file."""
    for name, file in files.items():
        if file is not None and file.exists() and not file.is_file():
            raise OSError(f"--{name}: {str(file)!r} is not an ordinary file; pass another name")


def require_model_folder(model: str | None, option: str = "--model") -> None:
    """Refuse a model folder that holds no model, by its option."""
    if model is None:
        return
    if not model:
        raise ValueError(f"{option} is empty; pass a name on the hub or a local folder")
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{option}: the folder {model!r} has no config.json")
    elif folder.exists() or not HUB_NAME.fullmatch(model):
        raise NotADirectoryError(f"{option}: {model!r} is neither a folder nor a name on the hub")


def require_data(**sources: str | None) -> None:
    """Refuse sources that are neither files nor possible data set names, naming the option."""
    for name, source in sources.items():
        if source is None or Path(source).is_file() or (source and Path(source).is_dir()):
            continue
        if not HUB_NAME.fullmatch(source) or source.endswith((".json", ".txt")):
            raise FileNotFoundError(
                f"--{name}: {source!r} is neither a file nor the name of a data set on the hub"
            )


def parts(text: str, option: str) -> list[str]:
    """The parts of a comma-separated list."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise ValueError(f"{option} is an empty list")
    return found


def integers(text: str, option: str) -> list[int]:
    """The integers of a comma-separated list."""
    try:
        return [int(part) for part in parts(text, option)]
    except ValueError:
        raise ValueError(f"{option} takes whole numbers such as 0,5,-1, got {text!r}") from None


def number_or_auto(text: str, option: str, kind: Callable[[str], float]) -> Any:
    """Parse a finite number of this kind, or ``"auto"``."""
    if text == "auto":
        return "auto"
    try:
        number = kind(text)
    except ValueError:
        raise ValueError(f"{option} takes a number or 'auto', got {text!r}") from None
    if not -math.inf < number < math.inf:
        raise ValueError(f"{option} takes a finite number or 'auto', got {text!r}")
    return number
