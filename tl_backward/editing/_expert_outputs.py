"""The experts of a layer as one dense matrix: what they write is that of a wide ``W_out``.

A token's experts give ``sum_e w_e x_e W_e``, with routing weights ``w_e`` and the input ``x_e`` of
each one's own ``W_out``. That is ``x W`` with all ``w_e x_e`` side by side in ``x``, 0 for experts
that the token is not routed to, and all ``W_e`` below each other in ``W``.
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
    """Every expert's ``W_out`` of one layer, as one matrix.

    Attributes:
        name: ``"blocks.5.mlp.experts.W_out"``.
        layer: The layer.
        sites: The sites, expert by expert.
        mixture: Their mixture.
        stacked: What computes their inputs.
    """

    name: str
    layer: int | None
    sites: tuple[WeightSite, ...]
    mixture: Mixture
    stacked: StackedExperts

    @property
    def d_out(self) -> int:
        """Width of what they write."""
        return self.sites[0].d_out

    @property
    def end(self) -> Tap:
        """Where all has been seen."""
        return self.mixture.output()

    def watch(self, recorder: Recorder) -> None:
        """Keep what is seen in a run."""
        for part, tap in self.mixture.taps.items():
            recorder.keep_value(tap(), (self.name, part))
        recorder.keep_value(self.mixture.output(), (self.name, "y"))

    def inputs(self, recorder: Recorder, n_texts: int) -> ExpertInputs:
        """The inputs in the first use in a run."""
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
        for site, of_one in zip(self.sites, each, strict=True):
            if of_one.any():
                yield site, of_one


@dataclass(frozen=True, eq=False)
class ExpertInputs:
    """The inputs of the one matrix, made for the places that they are asked for at.

    Attributes:
        outputs: The experts.
        h: What goes into all experts of a token.
        routes: Where it goes.
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
            of_expert = (weights * is_at).sum(-1)[rows]
            wide[rows, expert] = self.outputs.stacked.keys(expert, h[rows], of_expert).to(wide)
        return rearrange(wide, "term expert d_in -> term (expert d_in)")


def output_matrices(sites: Iterable[WeightSite]) -> list[WeightSite | ExpertOutputs]:
    """Sites of ``W_out``, those of all experts of a layer as one; shared experts are left out.

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
                f"{name} of a HookedTransformer are modules of their own, which no shift is made "
                "for; use a TransformerBridge"
            )
        found[name] = ExpertOutputs(
            f"{name}.W_out", of_mixture[0].layer, tuple(of_mixture), mixture, mixture.stacked
        )
    return list(found.values())


def dense_matrices(matrices: Iterable[WeightSite | ExpertOutputs]) -> list[WeightSite]:
    """The same, where none is of experts.

    Raises:
        NotImplementedError: When one is.
    """
    dense = []
    for matrix in matrices:
        if isinstance(matrix, ExpertOutputs):
            raise NotImplementedError(
                f"there are no key statistics of {matrix.name}, in which every token passes other "
                "weights; pass a layer without experts, or leave the statistics out"
            )
        dense.append(matrix)
    return dense
