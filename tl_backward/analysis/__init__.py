"""The paper's experiments, and the questions that it leaves open, each as a table and a figure."""

from tl_backward.analysis.ablation import ablation, plot_ablation
from tl_backward.analysis.attention import attention_heads, plot_attention_heads
from tl_backward.analysis.experiments import EXPERIMENTS, Experiment
from tl_backward.analysis.fact_similarity import fact_similarity, plot_fact_similarity
from tl_backward.analysis.figures import segment_means
from tl_backward.analysis.gradient_neurons import gradient_neurons, plot_gradient_neurons
from tl_backward.analysis.gradient_rank import gradient_rank, plot_gradient_rank
from tl_backward.analysis.imprint_and_shift import (
    plot_shift_energy,
    plot_step_effect,
    shift_energy,
    step_effect,
)
from tl_backward.analysis.layer_similarity import layer_similarity, plot_layer_similarity
from tl_backward.analysis.many_edits import many_edits, plot_many_edits
from tl_backward.analysis.optimizers import optimizer_updates, plot_optimizer_updates
from tl_backward.analysis.output_vjp import output_vjp, plot_output_vjp
from tl_backward.analysis.segments import SEGMENTS, Fact, fact_of, prompt_segments
from tl_backward.analysis.smallest_edit import plot_smallest_edit, smallest_edit
from tl_backward.analysis.target_rank import plot_target_rank, target_rank
from tl_backward.analysis.translator_ranks import (
    fit_linear_translator,
    plot_translator_ranks,
    translator_ranks,
)
from tl_backward.analysis.vjp_norms import plot_vjp_norms, vjp_norms

__all__ = [
    "EXPERIMENTS",
    "SEGMENTS",
    "Experiment",
    "Fact",
    "ablation",
    "attention_heads",
    "fact_of",
    "fact_similarity",
    "fit_linear_translator",
    "gradient_neurons",
    "gradient_rank",
    "layer_similarity",
    "many_edits",
    "optimizer_updates",
    "output_vjp",
    "plot_ablation",
    "plot_attention_heads",
    "plot_fact_similarity",
    "plot_gradient_neurons",
    "plot_gradient_rank",
    "plot_layer_similarity",
    "plot_many_edits",
    "plot_optimizer_updates",
    "plot_output_vjp",
    "plot_shift_energy",
    "plot_smallest_edit",
    "plot_step_effect",
    "plot_target_rank",
    "plot_translator_ranks",
    "plot_vjp_norms",
    "prompt_segments",
    "segment_means",
    "shift_energy",
    "smallest_edit",
    "step_effect",
    "target_rank",
    "translator_ranks",
    "vjp_norms",
]
