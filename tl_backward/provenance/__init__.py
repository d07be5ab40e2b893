"""Provenance of results on disk: differences are refused by name."""

from tl_backward.provenance.descriptions import hash_of
from tl_backward.provenance.folders import Provenance, only_writer, provenance, require_same

__all__ = ["Provenance", "hash_of", "only_writer", "provenance", "require_same"]
