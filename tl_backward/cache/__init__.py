"""The cache of one forward and one backward pass."""

from tl_backward.cache.backward_cache import BackwardCache

__all__ = ["BackwardCache"]
