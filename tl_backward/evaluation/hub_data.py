"""Data sets on the Hugging Face hub."""

from __future__ import annotations

from typing import Any


def load_hub_data(name: str, *configuration: str, split: str) -> Any:
    """Load a split of a data set with ``datasets``.

    Raises:
        ValueError: If it cannot be loaded, for whatever reason.
    """
    from datasets import load_dataset

    try:
        return load_dataset(name, *configuration, split=split)
    except Exception as error:  # the hub, a builder or a damaged cache can raise anything
        raise ValueError(
            f"source: {name!r} is neither a file nor a data set that can be loaded "
            f"({type(error).__name__}: {error})"
        ) from error
