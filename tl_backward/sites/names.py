"""Parsing site names."""

from __future__ import annotations

import re
from typing import NamedTuple

_NAME = re.compile(r"(?:blocks\.(?P<layer>\d+)\.)?(?:\w+\.)*?(?P<kind>W_\w+(?:\.[^.]+)*)")


class SiteName(NamedTuple):
    """What a site's name says: ``blocks.5.mlp.W_out`` is layer 5's ``W_out``.

    Attributes:
        layer: The layer; None outside the blocks.
        kind: The kind of weight.
        expert: The expert; None outside mixtures of experts.
    """

    layer: int | None
    kind: str
    expert: int | None = None


def parse_site_name(name: str) -> SiteName:
    """Parse a site's name.

    Raises:
        ValueError: When it is no site's name.

    Example:
        >>> parse_site_name("blocks.5.mlp.W_out")
        SiteName(layer=5, kind='W_out', expert=None)
        >>> parse_site_name("blocks.5.mlp.experts.3.W_out").expert
        3
        >>> parse_site_name("embed.W_E").layer is None
        True
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} is no site's name, such as 'blocks.5.mlp.W_out'")
    expert = re.search(r"\.experts\.(\d+)\.", name)
    return SiteName(layer_of(name), found["kind"], int(expert[1]) if expert else None)


def layer_of(name: str) -> int | None:
    """The layer in the name of a site or HookPoint; None outside the blocks."""
    found = re.match(r"blocks\.(\d+)\.", name)
    return int(found[1]) if found else None
