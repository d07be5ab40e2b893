"""The paper's experiments and its open questions, each as a table and a figure.

Importing a module registers its experiment in ``EXPERIMENTS``, in the order of a report.
"""

# ruff: isort: off
from tl_backward.analysis.gradient_rank import (
    gradient_rank as gradient_rank,
    plot_gradient_rank as plot_gradient_rank,
)
from tl_backward.analysis.vjp_norms import vjp_norms as vjp_norms, plot_vjp_norms as plot_vjp_norms
from tl_backward.analysis.target_rank import (
    target_rank as target_rank,
    plot_target_rank as plot_target_rank,
)
from tl_backward.analysis.layer_similarity import (
    layer_similarity as layer_similarity,
    plot_layer_similarity as plot_layer_similarity,
)
from tl_backward.analysis.gradient_neurons import (
    gradient_neurons as gradient_neurons,
    plot_gradient_neurons as plot_gradient_neurons,
)
from tl_backward.analysis.output_vjp import (
    output_vjp as output_vjp,
    plot_output_vjp as plot_output_vjp,
)
from tl_backward.analysis.shift_energy import (
    shift_energy as shift_energy,
    plot_shift_energy as plot_shift_energy,
)
from tl_backward.analysis.step_effect import (
    step_effect as step_effect,
    plot_step_effect as plot_step_effect,
)
from tl_backward.analysis.smallest_edit import (
    smallest_edit as smallest_edit,
    plot_smallest_edit as plot_smallest_edit,
)
from tl_backward.analysis.many_edits import (
    many_edits as many_edits,
    plot_many_edits as plot_many_edits,
)
from tl_backward.analysis.translator_ranks import (
    translator_ranks as translator_ranks,
    plot_translator_ranks as plot_translator_ranks,
)
from tl_backward.analysis.attention import (
    attention_heads as attention_heads,
    plot_attention_heads as plot_attention_heads,
)
from tl_backward.analysis.fact_similarity import (
    fact_similarity as fact_similarity,
    plot_fact_similarity as plot_fact_similarity,
)
from tl_backward.analysis.optimizers import (
    optimizer_updates as optimizer_updates,
    plot_optimizer_updates as plot_optimizer_updates,
)
from tl_backward.analysis.ablation import ablation as ablation, plot_ablation as plot_ablation
# ruff: isort: on

from tl_backward.analysis.figures import segment_means as segment_means
from tl_backward.analysis.registry import EXPERIMENTS as EXPERIMENTS
from tl_backward.analysis.registry import Experiment as Experiment
from tl_backward.analysis.registry import figure_of as figure_of
from tl_backward.analysis.segments import SEGMENTS as SEGMENTS
from tl_backward.analysis.segments import Fact as Fact
from tl_backward.analysis.segments import fact_of as fact_of
from tl_backward.analysis.segments import prompt_segments as prompt_segments
from tl_backward.analysis.translator_ranks import fit_linear_translator as fit_linear_translator

__all__ = [
    *EXPERIMENTS,
    *(f"plot_{name}" for name in EXPERIMENTS),
    "EXPERIMENTS",
    "SEGMENTS",
    "Experiment",
    "Fact",
    "fact_of",
    "figure_of",
    "fit_linear_translator",
    "prompt_segments",
    "segment_means",
]
