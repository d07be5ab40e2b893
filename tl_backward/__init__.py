"""Read and edit a language model's backward pass in vocabulary space, with TransformerLens."""

from tl_backward import training
from tl_backward._requirements import require_matching_packages
from tl_backward.cache import BackwardCache
from tl_backward.capture import run_with_backward_cache
from tl_backward.capture.objectives import kl_divergence, lm_cross_entropy_loss, logit_diff
from tl_backward.editing import (
    KeyStatistics,
    MendEditor,
    WeightEdit,
    adam_fine_tune,
    alpha_edit,
    edit_hooks,
    fine_tune,
    forward_pass_shift,
    gradient_step,
    key_statistics,
    memit,
    rome,
    train_mend,
)
from tl_backward.factors import GradientFactors
from tl_backward.lens import BackwardLensResult, BackwardLogitLens
from tl_backward.sites import (
    WeightSite,
    add_hook_points,
    coverage,
    remove_hook_points,
    weight_sites,
)
from tl_backward.sweep import sweep

__version__ = "0.1.0"

__all__ = [
    "BackwardCache",
    "BackwardLensResult",
    "BackwardLogitLens",
    "GradientFactors",
    "KeyStatistics",
    "MendEditor",
    "WeightEdit",
    "WeightSite",
    "adam_fine_tune",
    "add_hook_points",
    "alpha_edit",
    "coverage",
    "edit_hooks",
    "fine_tune",
    "forward_pass_shift",
    "gradient_step",
    "key_statistics",
    "kl_divergence",
    "lm_cross_entropy_loss",
    "logit_diff",
    "memit",
    "remove_hook_points",
    "rome",
    "run_with_backward_cache",
    "sweep",
    "train_mend",
    "training",
    "weight_sites",
]

require_matching_packages()
