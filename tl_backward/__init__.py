"""Read a language model's backward pass: gradients in vocabulary space, for TransformerLens."""

from tl_backward.cache import BackwardCache
from tl_backward.capture import run_with_backward_cache
from tl_backward.factors import GradientFactors
from tl_backward.lens import BackwardLogitLens
from tl_backward.lens_result import BackwardLensResult
from tl_backward.objectives import kl_divergence, lm_cross_entropy_loss, logit_diff
from tl_backward.sites import (
    WeightSite,
    add_hook_points,
    coverage,
    remove_hook_points,
    weight_sites,
)
from tl_backward.sweep import sweep

__all__ = [
    "BackwardCache",
    "BackwardLensResult",
    "BackwardLogitLens",
    "GradientFactors",
    "WeightSite",
    "add_hook_points",
    "coverage",
    "kl_divergence",
    "lm_cross_entropy_loss",
    "logit_diff",
    "remove_hook_points",
    "run_with_backward_cache",
    "sweep",
    "weight_sites",
]
