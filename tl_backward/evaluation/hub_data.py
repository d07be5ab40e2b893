"""Data sets on the Hugging Face hub."""

from __future__ import annotations

from typing import Any


def load_hub_data(name: str, *configuration: str, split: str) -> Any:
    """A split of a data set, as ``datasets`` loads it.

    Raises:
        ValueError: When it cannot be loaded, for whatever reason.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, *configuration, split=split)
    except Exception as error:  # of any kind: from the hub, a builder, or a damaged cache
        raise ValueError(
            f"source: {name!r} is no file, and no data set that can be loaded "
            f"({type(error).__name__}: {error})"
        ) from error
