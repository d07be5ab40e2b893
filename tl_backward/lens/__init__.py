"""The backward lens: gradients and VJPs read in the model's vocabulary."""

from tl_backward.lens.edits import EditReadout
from tl_backward.lens.lens import BackwardLogitLens
from tl_backward.lens.readout import Readout
from tl_backward.lens.result import BackwardLensResult

__all__ = ["BackwardLensResult", "BackwardLogitLens", "EditReadout", "Readout"]
