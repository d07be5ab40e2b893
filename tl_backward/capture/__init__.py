"""One forward and one backward pass, recorded."""

from tl_backward.capture.run import CaptureOptions, Hooks, run_with_backward_cache

__all__ = ["CaptureOptions", "Hooks", "run_with_backward_cache"]
