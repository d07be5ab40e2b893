"""The experts of a layer as one dense matrix: a wide ``W_out``.

A token's experts output ``sum_e w_e x_e W_e``, with routing weights ``w_e`` and the input ``x_e``
of each expert's ``W_out``. This equals ``x W``, where ``x`` concatenates all ``w_e x_e`` (0 for
experts that the token is not routed to) and ``W`` stacks all ``W_e``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_backward.cache.rows import by_text
from tl_backward.capture.recorder import Recorder
from tl_backward.sites import Mixture, Tap, WeightSite
from tl_backward.sites.mixture import Routes
from tl_backward.sites.stacked_experts import StackedExperts


@dataclass(frozen=True, eq=False)
class ExpertOutputs:
    """The ``W_out`` of all experts of one layer, as one matrix.

    Attributes:
        name: Its name, e.g. ``"blocks.5.mlp.experts.W_out"``.
        layer: The layer.
        sites: The sites, in expert order.
        mixture: Their mixture.
        stacked: Computes their inputs.
    """

    name: str
    layer: int | None
    sites: tuple[WeightSite, ...]
    mixture: Mixture
    stacked: StackedExperts

    @property
    def d_out(self) -> int:
        """Width of their output."""
        return self.sites[0].d_out

    @property
    def end(self) -> Tap:
        """The tap after which everything has been recorded."""
        return self.mixture.output()

    def watch(self, recorder: Recorder) -> None:
        """Record inputs, routes and output in a run."""
        for part, tap in self.mixture.taps.items():
            recorder.keep_value(tap(), (self.name, part))
        recorder.keep_value(self.mixture.output(), (self.name, "y"))

    def inputs(self, recorder: Recorder, n_texts: int) -> ExpertInputs:
        """The inputs of the first use in a run."""
        parts = self.mixture.taps
        seen = {part: recorder.values((self.name, part))[0] for part in parts}
        routes = self.mixture.routes(seen)
        h, experts, weights = (by_text(one, n_texts) for one in (seen["input"], *routes))
        return ExpertInputs(self, h, Routes(experts, weights))

    def split(
        self, keys: Float[Tensor, "term d_wide"]
    ) -> Iterator[tuple[WeightSite, Float[Tensor, "term d_in"]]]:
        """The keys of each expert that has any."""
        each = rearrange(keys, "term (expert d_in) -> expert term d_in", expert=len(self.sites))
        for site, own in zip(self.sites, each, strict=True):
            if own.any():
                yield site, own


@dataclass(frozen=True, eq=False)
class ExpertInputs:
    """The inputs of the wide matrix, computed for the indexed places.

    Attributes:
        outputs: The experts.
        h: The input that all experts of a token share.
        routes: The routes of the tokens.
    """

    outputs: ExpertOutputs
    h: Float[Tensor, "batch pos d_model"]
    routes: Routes

    def __getitem__(
        self, at: tuple[Int[Tensor, "term"], Int[Tensor, "term"]]
    ) -> Float[Tensor, "term d_wide"]:
        h, experts, weights = self.h[at], self.routes.experts[at], self.routes.weights[at]
        sites = self.outputs.sites
        wide = h.new_zeros(len(h), len(sites), sites[0].d_in)
        for expert in experts.unique().tolist():
            is_at = experts == expert
            rows = is_at.any(-1)
            own = (weights * is_at).sum(-1)[rows]
            wide[rows, expert] = self.outputs.stacked.keys(expert, h[rows], own).to(wide)
        return rearrange(wide, "term expert d_in -> term (expert d_in)")


def output_matrices(sites: Iterable[WeightSite]) -> list[WeightSite | ExpertOutputs]:
    """Sites of ``W_out``, with all experts of a layer as one matrix, without shared experts.

    Raises:
        NotImplementedError: For experts without a common module.
    """
    by_mixture: dict[str, list[WeightSite]] = {}
    found: dict[str, WeightSite | ExpertOutputs] = {}
    for site in sites:
        if site.mixture is not None:
            by_mixture.setdefault(site.mixture.name, []).append(site)
            found[site.mixture.name] = site
        elif ".shared_experts." not in site.name:
            found[site.name] = site
    for name, of_mixture in by_mixture.items():
        mixture = of_mixture[0].mixture
        if mixture is None or mixture.stacked is None:
            raise NotImplementedError(
                f"{name} are separate modules of a HookedTransformer, which the shift does not "
                "support; use a TransformerBridge"
            )
        found[name] = ExpertOutputs(
            f"{name}.W_out", of_mixture[0].layer, tuple(of_mixture), mixture, mixture.stacked
        )
    return list(found.values())


def dense_matrices(matrices: Iterable[WeightSite | ExpertOutputs]) -> list[WeightSite]:
    """Return the matrices unchanged, unless one belongs to experts.

    Raises:
        NotImplementedError: If one belongs to experts.
    """
    dense = []
    for matrix in matrices:
        if isinstance(matrix, ExpertOutputs):
            raise NotImplementedError(
                f"there are no key statistics of {matrix.name}, where tokens use different "
                "weights; pass a layer without experts, or leave the statistics out"
            )
        dense.append(matrix)
    return dense
