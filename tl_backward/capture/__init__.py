"""One forward and one backward pass, recorded."""

from tl_backward.capture.run import Hooks, run_with_backward_cache

__all__ = ["Hooks", "run_with_backward_cache"]
