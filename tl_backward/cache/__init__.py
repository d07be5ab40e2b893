"""What one forward and one backward pass leave behind."""

from tl_backward.cache.backward_cache import BackwardCache

__all__ = ["BackwardCache"]
