"""Recording one forward and one backward pass."""

from tl_backward.capture.run import CaptureOptions, run_with_backward_cache
from tl_backward.capture.run_hooks import Hooks

__all__ = ["CaptureOptions", "Hooks", "run_with_backward_cache"]
