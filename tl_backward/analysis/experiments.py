"""All experiments that need nothing but a model and records."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from tl_backward.analysis.ablation import ablation, plot_ablation
from tl_backward.analysis.attention import attention_heads, plot_attention_heads
from tl_backward.analysis.fact_similarity import fact_similarity, plot_fact_similarity
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
from tl_backward.analysis.smallest_edit import plot_smallest_edit, smallest_edit
from tl_backward.analysis.target_rank import plot_target_rank, target_rank
from tl_backward.analysis.translator_ranks import plot_translator_ranks, translator_ranks
from tl_backward.analysis.vjp_norms import plot_vjp_norms, vjp_norms

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


class Experiment(NamedTuple):
    """A function of a model and records, the figure of its table, and what it is about.

    Attributes:
        run: The function.
        plot: Its figure.
        about: In the paper.
        options: What else it can make use of: ``"texts"``, ``"jacobian_lens"``.
        resumes: Whether it goes on from the rows in a folder, ``path``.
    """

    run: Callable[..., pd.DataFrame]
    plot: Callable[[pd.DataFrame], Figure]
    about: str
    options: tuple[str, ...] = ()
    resumes: bool = True


EXPERIMENTS = {
    "gradient_rank": Experiment(gradient_rank, plot_gradient_rank, "Fig 3, Lemma 4.1"),
    "vjp_norms": Experiment(vjp_norms, plot_vjp_norms, "Fig 5, 16, 17"),
    "target_rank": Experiment(target_rank, plot_target_rank, "Fig 6, 18-21, 24, 25"),
    "layer_similarity": Experiment(layer_similarity, plot_layer_similarity, "Fig 22, 23"),
    "gradient_neurons": Experiment(gradient_neurons, plot_gradient_neurons, "Fig 7-9"),
    "output_vjp": Experiment(output_vjp, plot_output_vjp, "Lemma 5.1"),
    "shift_energy": Experiment(shift_energy, plot_shift_energy, "Section 6 against the gradient"),
    "step_effect": Experiment(step_effect, plot_step_effect, "Eq 17, 18"),
    "smallest_edit": Experiment(smallest_edit, plot_smallest_edit, "Fig 26", ("texts",)),
    "many_edits": Experiment(many_edits, plot_many_edits, "Open: many edits", ("texts",)),
    "translator_ranks": Experiment(
        translator_ranks, plot_translator_ranks, "Open: early layers", ("jacobian_lens",)
    ),
    "attention_heads": Experiment(attention_heads, plot_attention_heads, "Open: attention"),
    "fact_similarity": Experiment(
        fact_similarity, plot_fact_similarity, "Open: other facts", resumes=False
    ),
    "optimizer_updates": Experiment(optimizer_updates, plot_optimizer_updates, "Open: optimizers"),
    "ablation": Experiment(ablation, plot_ablation, "Open: are MLPs the cause"),
}
"""By name. Those with a choice to make beforehand are ``many_edits`` and ``translator_ranks``."""
