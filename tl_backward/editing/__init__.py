"""Low-rank weight edits, as hooks or applied in place and reverted exactly."""

from tl_backward.editing._mend_training import train_mend
from tl_backward.editing.adam import adam_fine_tune
from tl_backward.editing.alpha_edit import alpha_edit
from tl_backward.editing.contexts import memit_contexts, rome_contexts
from tl_backward.editing.editor_report import EditorReport
from tl_backward.editing.forward_shift import ShiftReport, StepNotFoundError, forward_pass_shift
from tl_backward.editing.gradient_step import FineTuneReport, fine_tune, gradient_step
from tl_backward.editing.hooks import edit_hooks
from tl_backward.editing.key_statistics import KeyStatistics, key_statistics
from tl_backward.editing.memit import memit
from tl_backward.editing.mend import MendEditor, MendReport
from tl_backward.editing.rome import rome
from tl_backward.editing.weight_edit import WeightEdit

__all__ = [
    "EditorReport",
    "FineTuneReport",
    "KeyStatistics",
    "MendEditor",
    "MendReport",
    "ShiftReport",
    "StepNotFoundError",
    "WeightEdit",
    "adam_fine_tune",
    "alpha_edit",
    "edit_hooks",
    "fine_tune",
    "forward_pass_shift",
    "gradient_step",
    "key_statistics",
    "memit",
    "memit_contexts",
    "rome",
    "rome_contexts",
    "train_mend",
]
